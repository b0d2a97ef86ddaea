"""Small controlled experiments behind docs/vit-questions.md: `make studies`, or `python -m pretrain.studies`.

`questions` says what is compared, `runner` trains it, `statistics` tells differences from noise, `report` keeps the results
in docs/studies and writes the page's tables from them.
"""
