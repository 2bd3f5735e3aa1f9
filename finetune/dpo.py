"""Learn from pairs of answers with LoRA (DPO, IPO, SimPO, ORPO); the result, OUT_DIR/final/lit_model.pth,
holds the adapter only.

python finetune/dpo.py --checkpoint_dir checkpoints/$repo_id --data pairs.jsonl --out_dir $dir
python finetune/dpo.py --checkpoint_dir $finetuned_dir/final --data pairs.jsonl --preference.loss simpo
"""

from functools import partial

from litlora import cli
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
    dataset = read_dataset(settings.data, pairs=True)

    from litlora.lora import adapter_of, add_lora
    from litlora.train.method import Method
    from litlora.train.preference import Preference
    from litlora.train.run import finetune

    preference = Method(
        prepare=lambda model: add_lora(model, settings.lora),
        trains_base=False,
        dense=settings.lora.modules_to_save,
        content=lambda model: adapter_of(model, settings.lora),
        objective=partial(Preference, preference=settings.preference),
        tokenize=tokenize_pairs,
        stores="the adapter only",
        resume="python {script} --config {config} --resume auto",
        next=f"{cli.call('chat/base.py')} --checkpoint_dir {{result}}",
    )
    finetune(settings, preference, dataset, place)


if __name__ == "__main__":
    cli.run(main, FinetuneDPO)
