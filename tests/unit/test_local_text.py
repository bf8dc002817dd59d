import pytest

from dyn.data import local_text
from dyn.data.local_text import content_hash, domains, is_held_out, manifest


@pytest.fixture(scope="module")
def real():
    return domains(limit_bytes=300_000)


def test_real_text_of_this_machine(real):
    assert set(real) == {"code", "docs", "licences"}
    assert any("def " in d.text for d in real["code"]["train"])
    assert any("warrant" in d.text.lower() for d in real["licences"]["train"])
    for splits in real.values():
        sizes = {s: sum(len(d.text.encode()) for d in documents) for s, documents in splits.items()}
        assert 50_000 < sizes["train"] < 300_000 + local_text.LARGEST and sizes["validation"] > 2_000
        assert not any(d.source.startswith("/") for documents in splits.values() for d in documents)


def test_the_same_again(real):
    assert domains(["docs"], limit_bytes=300_000)["docs"] == real["docs"]


def test_held_out_text_is_not_in_train(real):
    def grams(text):
        words = "".join(c if c.isalpha() else " " for c in text.lower()).split()
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    for splits in real.values():
        train = set().union(*(grams(d.text) for d in splits["train"]))
        shares = [len(g & train) / len(g) for d in splits["validation"] if (g := grams(d.text))]
        assert max(shares) < local_text.LEAK + 0.15  # the product looks at a sample of the 8-grams


def test_content_decides_the_split():
    texts = [f"document number {i}" for i in range(4000)]
    share = sum(is_held_out(t, 0.1) for t in texts) / len(texts)
    assert share == pytest.approx(0.1, abs=0.02)  # four standard errors
    assert all(is_held_out(t, 0.3) for t in texts if is_held_out(t, 0.1))
    assert content_hash("a  b\n") == content_hash("a b")


def _made_up(monkeypatch, texts):
    monkeypatch.setitem(local_text.DOMAINS, "made", lambda: iter([(f"text {i}", lambda t=t: t) for i, t in enumerate(texts)]))
    return lambda **settings: domains(["made"], **settings)["made"]


def _words(i, count=120):
    return " ".join(f"w{chr(97 + (i * 7 + j * j) % 26)}{chr(97 + (i + j * 3) % 26)}{chr(97 + i % 26)}" for j in range(count))


def test_copies_are_left_out(monkeypatch):
    different = [_words(i) for i in range(20)]
    licence = _words(25)
    dated = [f"Copyright {year} by someone\n{licence}" for year in range(1990, 2010)]
    collect = _made_up(monkeypatch, different + different + dated)
    documents = [d.text for split in collect(held_out=0.3).values() for d in split]
    assert len([t for t in documents if "Copyright" in t]) == 1
    assert len(documents) == 21


def test_limits(monkeypatch):
    collect = _made_up(monkeypatch, [_words(i) for i in range(26)])
    whole = collect(held_out=0.3, limit_validation_bytes=10**9)
    part = collect(held_out=0.3, limit_bytes=2000, limit_validation_bytes=1000)
    size = len(_words(0)) + 1
    for split, limit in {"train": 2000, "validation": 1000}.items():
        assert part[split] == whole[split][: len(part[split])]
        assert limit <= len(part[split]) * size < limit + size


def test_refused(monkeypatch):
    with pytest.raises(ValueError, match="no domain 'cod'; it has code, docs, licences"):
        domains(["cod"])
    with pytest.raises(ValueError, match="held_out=0"):
        domains(held_out=0)
    with pytest.raises(ValueError, match="no train documents for the domain 'made' on this machine \\(1 files"):
        _made_up(monkeypatch, ["too short"])()


def test_a_machine_without_debians_files(monkeypatch):
    with_them = manifest()
    monkeypatch.setattr(local_text, "DEBIAN", (("/nowhere/doc", "*/copyright"),))
    assert manifest()["debian_files"] == 0
    assert (manifest()["digest"] == with_them["digest"]) == (with_them["debian_files"] == 0)
    assert domains(["licences"])["licences"]["train"]


def test_manifest():
    assert manifest() == manifest() and set(manifest()) == {"python", "packages", "debian_files", "digest"}
