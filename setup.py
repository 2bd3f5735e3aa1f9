"""What pyproject.toml cannot say: a wheel has the commands and the quickstart base, too."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("finetune", "chat", "scripts", "configs", "checkpoints/litlora/quickstart")


class BuildWithCommands(build_py):
    """Copies FOLDERS to litlora/installed, where litlora.settings.REPOSITORY finds them."""

    def run(self):
        super().run()
        if self.editable_mode:  # the repository is there
            return
        for folder in filter(Path.is_dir, map(Path, FOLDERS)):
            target = Path(self.build_lib, "litlora/installed", folder)
            shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithCommands})
