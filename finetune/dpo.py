"""Learn from pairs of answers with LoRA (DPO, IPO, SimPO, ORPO), or from good and bad ones (KTO); the
result, OUT_DIR/final/lit_model.pth, holds the adapter only.

python finetune/dpo.py --checkpoint_dir checkpoints/$repo_id --data pairs.jsonl --out_dir $dir
python finetune/dpo.py --checkpoint_dir $finetuned_dir/final --data pairs.jsonl --preference.loss simpo
"""

from functools import partial

from litlora import cli
from litlora.data.labelled import tokenize_labelled
from litlora.data.pairs import tokenize_pairs
from litlora.data.sources import read_dataset
from litlora.paths import checkpoint_dir
from litlora.settings import FinetuneDPO
from litlora.train.run_directory import run_directory


def main(settings: FinetuneDPO) -> None:
    base = checkpoint_dir(settings.checkpoint_dir)
    place = run_directory(
        settings.out_dir,
        f"out/dpo/{settings.data.name}",
        overwrite=settings.overwrite,
        resume=settings.resume,
        inputs=[base],
    )
    labels = settings.preference.learns_labels
    dataset = read_dataset(settings.data, "labels" if labels else "pairs")

    from litlora.train.adapter_method import adapter_method
    from litlora.train.kto import KTO
    from litlora.train.preference import Preference
    from litlora.train.run import finetune

    kind, tokenize = (KTO, tokenize_labelled) if labels else (Preference, tokenize_pairs)
    objective = partial(kind, preference=settings.preference)
    finetune(settings, adapter_method(settings, objective, tokenize), dataset, place)


if __name__ == "__main__":
    cli.run(main, FinetuneDPO)
