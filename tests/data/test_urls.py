"""What may name shards: paths and four kinds of URL, before braces are expanded and after. Nothing else, ever."""

import pytest

from pretrain.data import open_dataset
from pretrain.data.urls import check_source, expand, is_remote
from pretrain.errors import DataError

HOSTILE = [
    "pipe:cat a.tar",
    "PIPE:cat a.tar",
    " pipe:cat a.tar",
    "\tpipe:cat a.tar",
    "{pipe:cat,b}.tar",
    "{a,pipe:cat b}.tar",
    "p{i,}pe:cat a.tar",
    "pipe{:,}cat.tar",
    "a.tar::pipe:cat a.tar",
    "http://host/a.tar::pipe:cat a.tar",
    "file:///data/a.tar",
    "file:/data/a.tar",
    "FILE:///data/a.tar",
    "{file,http}://host/a.tar",
    "{http,https}://host/a.tar",
    "http{s,}://host/a.tar",
    "http://{a,b}/a.tar",
    "http://host{/a,:80/b}.tar",
    "HTTP://host/a.tar",
    " http://host/a.tar",
    "http:///a.tar",
    "http:host/a.tar",
    "http://host\\@evil/a.tar",
    "http://host/../a.tar",
    "http://host/b/{..,c}/a.tar",
    "http://host//a.tar",
    "http://host/a%2e%2e/b.tar",
    "http://host/a.tar\n",
    "http://host/a\x00.tar",
    "http://host/a;b.tar",
    "http://host/a|b.tar",
    "http://host/$(touch x).tar",
    "http://host/${WDS_X}.tar",
    "http://host:port/a.tar",
    "http://[::1]/a.tar",
    "ftp://host/a.tar",
    "s3a://bucket/a.tar",
    "hf://a/b.tar",
    "hdfs://a/b.tar",
    "ais:b/a.tar",
    "gopher://host/a.tar",
    "data:text/plain,a.tar",
    "a|b.tar",
    "$(touch x).tar",
    "${WDS_X}.tar",
    "$HOME/a.tar",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_anything_but_paths_and_plain_urls_is_refused_unread(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WDS_X", "a")
    monkeypatch.setenv("GOPEN_REWRITE", "http://host=/")
    with pytest.raises(
        DataError, match=r"is not a local path|is not a URL|empty steps|braces are left|a user name"
    ):
        open_dataset(source)
    assert list(tmp_path.iterdir()) == []


SECRETS = [
    "https://user:hunter2@host/a.tar",
    "https://hunter2@host/train",
    "s3://AKIAIOSFODNN7EXAMPLE:hunter2@bucket/a.tar",
    "https://host/a.tar?X-Amz-Signature=hunter2",
    "https://host/{0..9}.tar?token=hunter2",
    "https://host/a.tar#hunter2",
    "data/a.tar::https://user:hunter2@host/a.tar",
    "pipe:curl https://user:hunter2@host/a.tar",
]


@pytest.mark.parametrize("source", SECRETS)
def test_a_url_with_a_secret_is_refused_and_the_secret_is_not_shown(source):
    with pytest.raises(DataError) as refused:
        open_dataset(source)
    assert "hunter2" not in str(refused.value)
    assert "***" in str(refused.value)


@pytest.mark.parametrize(
    "source",
    [
        "data/train",
        "/data/a b/{000..003}.tar",
        "data/a.tar::data/b.tar",
        "https://host/train",
        "https://host:8443/sets/im-1k_v2/{000..003}.tar",
        "http://127.0.0.1:8080/a.tar",
        "s3://bucket.name-1/réf/a=1/{a,b}.tar::gs://bucket/c.tar",
    ],
)
def test_paths_and_plain_urls_are_taken(source):
    check_source(source)


def test_braces_are_expanded_in_paths_and_urls_alike():
    assert expand("d//a-{08..10}.tar::s3://b/{x,y}-{1..2}.tar") == [
        "d/a-08.tar", "d/a-09.tar", "d/a-10.tar",
        "s3://b/x-1.tar", "s3://b/x-2.tar", "s3://b/y-1.tar", "s3://b/y-2.tar",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"names https://h/a\.tar twice"):
        expand("https://h/{a,b,a}.tar")


@pytest.mark.parametrize("source", ["https://h/{a.tar", "https://h/{a}.tar"])
def test_braces_that_expand_to_nothing_are_refused(source):
    with pytest.raises(DataError, match=r"braces"):
        expand(source)


def test_what_is_remote():
    assert is_remote("s3://b/a.tar")
    assert not is_remote("/data/a:b.tar")
