"""All tests are offline, single-threaded, and away from the user's caches, but for the packaged models."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp(prefix="dyn-tests-"), "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import pytest
import torch

torch.set_num_threads(1)

_MODELS = Path(os.environ.get("DYN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dyn") / "models"
_MODELS.mkdir(parents=True, exist_ok=True)
os.environ["DYN_CACHE"] = tempfile.mkdtemp(prefix="dyn-tests-")
Path(os.environ["DYN_CACHE"], "models").symlink_to(_MODELS.resolve())  # unpacking the packaged models again would cost every process minutes


def _is_local(address) -> bool:
    return not isinstance(address, tuple) or address[0] in ("localhost", "", "::1") or str(address[0]).startswith("127.")


def _guarded(connect):
    def inner(self, address):
        if not _is_local(address):
            pytest.fail(f"a test reached for the network: {address}")
        return connect(self, address)

    return inner


socket.socket.connect = _guarded(socket.socket.connect)
socket.socket.connect_ex = _guarded(socket.socket.connect_ex)


def pytest_unconfigure():
    for name in ("HF_HOME", "DYN_CACHE"):
        shutil.rmtree(os.environ[name], ignore_errors=True)


class Processes:
    """See processes.py, which is also the script that runs experiments."""

    SCRIPT = Path(__file__).with_name("processes.py")

    def __init__(self) -> None:
        root = self.SCRIPT.parents[1]
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]), "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen([sys.executable, self.SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=root)

    def _ask(self, *words: object) -> int:
        self.process.stdin.write(shlex.join(map(str, words)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"{self.SCRIPT.name} died with {self.process.wait(60)}; its own message says why"
        return int(answer)

    def start(self, script: Path, runs: Path, output: Path, *words: object) -> int:
        return self._ask("start", script, runs, output, *words)

    def wait(self, pid: int) -> int:
        return self._ask("wait", pid)

    def run(self, runs: Path, *words: str) -> str:
        """What `python -m dyn.run`, with these words and its run folders in `runs`, says; it must succeed."""
        runs.mkdir(parents=True, exist_ok=True)
        output = runs / "output.txt"
        code = self.wait(self.start(self.SCRIPT, runs, output, *words))
        assert code == 0, output.read_text()[-5000:]
        return output.read_text()


@pytest.fixture(scope="session")
def processes():
    processes = Processes()
    yield processes
    processes.process.stdin.close()
    processes.process.wait(60)


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """A folder with the experiment `fake`, as the current directory."""
    folder = tmp_path / "fake"
    shutil.copytree(Path(__file__).parent / "fake", folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return folder


@pytest.fixture
def tiny_host():
    """(family, task, seed, **settings) -> a tiny random host of adapters in evaluation mode; task: classify | base | lm | qa."""
    import transformers

    bert = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99, max_position_embeddings=64,
                initializer_range=0.2)
    llama = bert | dict(num_key_value_heads=2, pad_token_id=0)
    families = {
        "bert": ("Bert", bert),
        "roberta": ("Roberta", bert | dict(pad_token_id=0)),
        "xlm_roberta": ("XLMRoberta", bert | dict(pad_token_id=0)),
        "electra": ("Electra", bert | dict(embedding_size=16)),
        "albert": ("Albert", bert | dict(embedding_size=16)),
        "distilbert": ("DistilBert", dict(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=99, max_position_embeddings=64,
                                          initializer_range=0.2)),
        "bart": ("Bart", dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
                              decoder_ffn_dim=64, vocab_size=99, max_position_embeddings=64, init_std=0.2)),
        "llama": ("Llama", llama), "mistral": ("Mistral", llama | dict(sliding_window=4)), "qwen2": ("Qwen2", llama),
        "qwen3": ("Qwen3", llama | dict(head_dim=8)),
        "llama_moe": ("LlamaMoe", llama | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, gate="linear", gate_noise=False)),
    }

    def make(family: str = "bert", task: str = "classify", seed: int = 0, **settings):
        prefix, fields = families[family]
        suffix = {"classify": "ForSequenceClassification", "base": "Model", "qa": "ForQuestionAnswering",
                  "lm": "ForConditionalGeneration" if family == "bart" else "ForCausalLM"}[task]
        if family == "llama_moe":
            from dyn.models import llama_moe as source
        else:
            source = transformers
        config = getattr(source, f"{prefix}Config")(**(fields | settings))
        torch.manual_seed(seed)
        return getattr(source, prefix + suffix)(config).eval()

    return make


@pytest.fixture
def tiny_text():
    """(samples, length, seed) -> input_ids and attention_mask of a padded batch."""

    def make(samples: int = 4, length: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 99, (samples, length), generator=generator)
        mask = torch.ones_like(ids)
        for i in range(1, samples):
            mask[i, length - i :] = 0
        return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}

    return make
