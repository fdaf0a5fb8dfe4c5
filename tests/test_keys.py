"""Signed promotions: what somebody without the key, or with a pencil, makes of the log is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from orchestrator.keys import Keys
from orchestrator.promotions import Promotion, PromotionLog
from orchestrator.registry import Registry
from orchestrator.site import Site
from tests.fake_mlflow import FakeMlflow
from workers.errors import CheckpointError, ConfigError
from workers.storage import open_store


def write_key(folder: Path, name: str, *, raw: bool = False) -> tuple[Path, Path]:
    key = Ed25519PrivateKey.generate()
    private, public = folder / name, folder / f"{name}.pub"
    form = (Encoding.Raw, PrivateFormat.Raw) if raw else (Encoding.PEM, PrivateFormat.PKCS8)
    private.write_bytes(key.private_bytes(*form, NoEncryption()))
    private.chmod(0o600)
    form = (Encoding.Raw, PublicFormat.Raw) if raw else (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    public.write_bytes(key.public_key().public_bytes(*form))
    return private, public


@pytest.fixture
def key(tmp_path: Path) -> tuple[Path, Path]:
    return write_key(tmp_path, "promoter")


def record(seq: int, version: int = 1, **changes: object) -> Promotion:
    fields = {"manifest": "file:///m", "digest": "d", "metric": "val_accuracy", "value": 0.9, "minimum": 0.5}
    base = {"previous": None, "time": 1.0, "user": "me", "alias": "champion"}
    return Promotion(**{"seq": seq, "model": "toy", "version": version, **base, **fields, **changes})


def signed_log(url: str, keys: Keys, count: int = 3) -> PromotionLog:
    log = PromotionLog(open_store(url), keys)
    for seq in range(count):
        log.append(record(seq, seq + 1))
    return log


def path(url: str, seq: int) -> Path:
    return Path(url.removeprefix("file://")) / f"promotions/toy/{seq:08d}.json"


@pytest.mark.parametrize("raw", [False, True])
def test_what_the_promoter_signs_everybody_believes(tmp_path: Path, store_url: str, raw: bool) -> None:
    private, public = write_key(tmp_path, "promoter", raw=raw)
    written = signed_log(store_url, Keys.load(private, public)).read("toy")
    assert [bool(promotion.signature) for promotion in written] == [True] * 3
    assert len({promotion.before for promotion in written}) == 3
    for keys in (Keys.load(None, public), Keys.load(private, None), Keys()):
        assert PromotionLog(open_store(store_url), keys).read("toy") == written


def change(url: str, field: str, value: object) -> None:
    values = json.loads(path(url, 2).read_bytes())
    path(url, 2).write_text(json.dumps(values | {field: value}, indent=1))


def swap(url: str) -> None:
    first, second = path(url, 1).read_bytes(), path(url, 2).read_bytes()
    path(url, 1).write_bytes(second)
    path(url, 2).write_bytes(first)


def write_again(url: str) -> None:
    """Removed, and written anew by somebody with another key."""
    path(url, 1).unlink()
    forger = Keys(private := Ed25519PrivateKey.generate(), (private.public_key(),))
    log = PromotionLog(open_store(url), forger)
    log._before["toy", 1] = json.loads(path(url, 2).read_bytes())["before"]
    log.append(record(1, 7))


def replay(url: str) -> None:
    """A good record of another model."""
    values = json.loads(path(url, 2).read_bytes())
    other = Path(url.removeprefix("file://")) / "promotions/other/00000000.json"
    other.parent.mkdir()
    other.write_text(json.dumps(values))


def unsigned(url: str) -> None:
    PromotionLog(open_store(url)).append(record(3, 9))


@pytest.mark.parametrize(
    ("tamper", "named", "chained"),
    [
        (lambda url: change(url, "version", 1), "00000002", False),
        (lambda url: change(url, "digest", "e"), "00000002", False),
        (lambda url: change(url, "signature", ""), "00000002", False),
        (lambda url: change(url, "signature", "AAAA"), "00000002", False),
        (lambda url: change(url, "signature", 5), "00000002", True),
        (lambda url: change(url, "before", ""), "00000002", True),
        (lambda url: path(url, 1).write_bytes(path(url, 1).read_bytes() + b" "), "00000002", True),
        (swap, "00000001", True),
        (write_again, "00000001", False),
        (unsigned, "00000003", False),
    ],
)
def test_a_log_that_was_tampered_with_is_refused(
    key: tuple[Path, Path], store_url: str, tamper: Callable[[str], object], named: str, chained: bool
) -> None:
    """`chained`: by those without a key, too."""
    signed_log(store_url, Keys.load(*key))
    tamper(store_url)
    for keys in [Keys.load(None, key[1]), *([Keys()] if chained else [])]:
        with pytest.raises(CheckpointError, match=rf"toy/{named}\.json .*delete it"):
            PromotionLog(open_store(store_url), keys).read("toy")


def test_what_is_read_of_a_record_is_what_was_signed(key: tuple[Path, Path], store_url: str) -> None:
    """Though it has a field twice."""
    log = signed_log(store_url, Keys.load(*key))
    signed = path(store_url, 2).read_text()
    path(store_url, 2).write_text(signed.replace("{", '{"version": 9,', 1))
    assert [promotion.version for promotion in log.read("toy")] == [1, 2, 3]
    path(store_url, 2).write_text(signed.rstrip().removesuffix("}") + ', "version": 9}')
    with pytest.raises(CheckpointError, match="was changed after it was signed"):
        log.read("toy")


def test_a_record_of_another_model_is_refused(key: tuple[Path, Path], store_url: str) -> None:
    signed_log(store_url, Keys.load(*key))
    replay(store_url)
    with pytest.raises(CheckpointError, match="is the record 2 of toy"):
        PromotionLog(open_store(store_url), Keys.load(None, key[1])).read("other")


def test_records_older_than_the_key_are_read_once_they_are_signed_for(
    key: tuple[Path, Path], store_url: str, mlflow: FakeMlflow
) -> None:
    for seq in range(2):
        values = record(seq).__dict__.copy()
        for name in ("before", "signature", "kind"):
            del values[name]
        path(store_url, seq).parent.mkdir(parents=True, exist_ok=True)
        path(store_url, seq).write_text(json.dumps(values))
    assert len(PromotionLog(open_store(store_url)).read("toy")) == 2
    reader = Registry(mlflow, store_url, Keys.load(None, key[1]))
    with pytest.raises(CheckpointError, match=r"00000001\.json is not signed, .*`vitscale sign toy`"):
        reader.log.read("toy")
    with pytest.raises(ConfigError, match="only who has it may promote"):
        reader.sign("toy", "")
    promoter = Registry(mlflow, store_url, Keys.load(*key))
    made = promoter.sign("toy", "all known to us")
    assert made is not None and (made.kind, made.seq) == ("signing", 2)
    assert promoter.sign("toy", "") is None
    assert [promotion.kind for promotion in reader.log.read("toy")] == ["promotion", "promotion", "signing"]
    assert reader.log.holders("toy")["champion"].seq == 1
    path(store_url, 0).write_text(path(store_url, 0).read_text().replace('"me"', '"you"'))
    with pytest.raises(CheckpointError, match="does not continue the records before it"):
        reader.log.read("toy")


def test_keys_that_are_none_are_named(tmp_path: Path, key: tuple[Path, Path]) -> None:
    private, public = key
    bad = tmp_path / "bad"
    bad.write_text("-----BEGIN PRIVATE KEY-----\nSECRETSECRET\n-----END PRIVATE KEY-----\n")
    with pytest.raises(ConfigError, match="no Ed25519 private key") as caught:
        Keys.load(bad, None)
    assert "SECRET" not in str(caught.value)
    bad.write_bytes(
        generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    with pytest.raises(ConfigError, match="no Ed25519 private key"):
        Keys.load(bad, None)
    for text in ("", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):
        bad.write_text(text)
        with pytest.raises(ConfigError, match="public key"):
            Keys.load(None, bad)
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.load(None, tmp_path)
    _, other = write_key(tmp_path, "other")
    with pytest.raises(ConfigError, match="lacks the public key of"):
        Keys.load(private, other)
    bad.write_bytes(other.read_bytes() + public.read_bytes())
    assert len(Keys.load(private, bad).public) == 2


def test_a_site_names_them(tmp_path: Path, key: tuple[Path, Path]) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(
        "{ray: 'http://x', mlflow: 'http://x', data: 'file:///x', runs: 'file:///x', "
        "promotion_key_file: promoter, promotion_public_key_file: promoter.pub}"
    )
    found = Site.load(site)
    assert (found.promotion_key_file, found.promotion_public_key_file) == key
    key[0].chmod(0o640)
    with pytest.raises(ConfigError, match=r"`promotion_key_file`: others can read .*chmod 600"):
        Site.load(site)
    key[0].unlink()
    with pytest.raises(ConfigError, match="`promotion_key_file`: there is no file"):
        Site.load(site)
