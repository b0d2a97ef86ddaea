import pytest

from pretrain.redact import redact_setting, redact_text


@pytest.mark.parametrize(
    "name",
    [
        "hf_token", "db.password", "API_KEY", "aws_secret_access_key", "auth", "x/passwd", "private-key", "PGPASSWORD",
        "accessToken", "clientSecret",
    ],
)  # fmt: skip
def test_a_setting_named_like_a_secret_is_hidden_whole(name):
    assert redact_setting(name, "hunter2") == "***"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("plan/num_tokens", "17"),
        ("model.num_prefix_tokens", "1"),
        ("model.global_pool", "token"),
        ("model.pos_embed_order", "cls_then_pe"),
        ("data.train.shards", "https://host/a-{000..099}.tar"),
        ("git_sha", "0123456789abcdef0123456789abcdef01234567"),
        ("train_digest", "ab" * 32),
        ("tracking.uri", "sqlite:////home/a@b/runs/mlflow.db"),
        ("author", "somebody@example.org"),
        ("hf_token", "None"),
        ("cls_token", "resized"),
        ("words", "authorization: see the docs of your store"),
        ("words", "s3://bucket/a@b, https://host/x@y and mail@host"),
        ("run.dir", "runs/hf-vit-base-patch16-224-finetune"),
        ("run.dir", "runs/hf_vit_base_patch16_224_finetune"),
        ("run.dir", "runs/sk-learn-digits-experiment-2"),
        ("run.campaign", "basic experiment, bearer of good news"),
        ("words", "cls_token: [1, 1, 768] in the checkpoint, reg_token=3 here"),
        ("words", "override 'tracking.hf_token': unknown key; allowed here: uri"),
        ("words", "one.yaml:3: tracking.hf_token: looks like a secret, which has no place here"),
    ],
)
def test_an_honest_setting_is_kept(name, value):
    assert redact_setting(name, value) == value


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hunter2@host/x.tar",
        "s3://hunter2@bucket/x",
        "https://user:p@ss@hunter2@host/x.tar",
        "PGPASSWORD=hunter2 psql",
        "credentials=hunter2",
        '{"accessToken": "hunter2"}',
        "Authorization: Token hunter2",
        "'Authorization': 'hunter2'",
        "https://host/x?X-Amz-Signature=1&token=hunter2",
        "cmd --password=hunter2 --x",
        "api_key: hunter2",
        "password: hunter2 and more",
        "token:hunter2",
        '{"secret": "hunter2"}',
        "Authorization: Bearer hunter2hunter2",
        "AKIAHUNTER2HUNTER222",
        "hf_hunter2hunter2hunter2",
        "ghp_hunter2hunter2hunter2hunter2",
        "github_pat_hunter2_hunter2hunter2",
        "glpat-hunter2-hunter2hunter2",
        "sk-proj-Hunter2hunter2hunter2",
        "Basic aHVudGVyMg==hunter2",
        "eyJhunter2hunter2.hunter2hunter2.hunter2",
        "-----BEGIN RSA PRIVATE KEY-----\nhunter2\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_a_value_that_looks_like_a_secret_is_hidden(text):
    assert "hunter2" not in redact_text(text).lower()
