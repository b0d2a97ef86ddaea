"""How processes are started: on one machine by accelerate or torchrun, on a cluster by Slurm.

`slurm` is the command, `python -m launch.slurm`; it renders `slurm/stage.sbatch`, submits and watches.

    profile    what a site's jobs look like: a YAML file, strict
    plain      what may stand in a script, and how it is quoted
    job        the stages of a chain as jobs: names, folders, commands
    sweep      one config with several values of some keys: the members and their names
    render     profile and job -> batch script
    snapshot   what a job leaves in its run directory before it starts
    queue      sbatch, squeue, scancel
    progress   how far the stages of a chain are
    best       which member of a sweep is the best one
    attempt    the batch script's questions: may this job start, and what now that it ended (`verdict`)
    keep       a command that ends with whoever started it
    mlflow_server  a tracking server for a cluster, `launch/mlflow-server`
    preflight  every rank sees its device, the network, the shards and the run directory
"""
