"""The compiler is imported by those who compile, and by no one else."""

import os
import subprocess
import sys

import pytest
from conftest import REPO


def said_by(code: str, *words: object) -> str:
    """The last line that a process of its own prints."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "script", [pytest.param(s, marks=pytest.mark.slow) for s in ("finetune/lora.py", "finetune/full.py")]
)
def test_a_run_that_compiles_nothing_imports_no_compiler(script, tmp_path):
    run = (
        "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print('torch._dynamo' in sys.modules)"
    )
    settings = (
        "--train.max_steps",
        2,
        "--train.save_interval",
        1,
        "--train.checkpoint_activations",
        "none",
        "--out_dir",
        tmp_path / "out",
    )
    assert said_by(run, script, *settings) == "False"


@pytest.mark.slow
def test_fabric_knows_a_compiled_module():
    code = """
import torch
from litlora.train.fabric import Fabric
from lightning_fabric.wrappers import _unwrap_compiled
layer = torch.nn.Linear(2, 2)
assert _unwrap_compiled(layer) == (layer, None)
compiled = torch.compile(layer)
assert type(compiled) is torch._dynamo.OptimizedModule
fabric = Fabric(accelerator="cpu", devices=1)
print(_unwrap_compiled(compiled)[0] is layer, len(fabric.setup(compiled).state_dict()))
"""
    assert said_by(code) == "True 2"


@pytest.mark.slow
def test_a_fabric_that_wants_more_of_the_compiler_gets_it():
    code = """
import sys
class Wants:
    def find_spec(self, name, path=None, target=None):
        if name == "lightning_fabric.wrappers":
            import torch._dynamo.eval_frame
sys.meta_path.insert(0, Wants())
from litlora.train.fabric import Fabric
from lightning_fabric import wrappers
print(wrappers.OptimizedModule is sys.modules["torch._dynamo"].OptimizedModule)
"""
    assert said_by(code) == "True"
