"""Names and layouts of other formats, both directions.

    families.py     Hugging Face's `config.json` -> ModelConfig and back, one entry a model family. Torch-free.
    layout.py       Hugging Face's module names and fused tensors <-> ours: `layout(model_type, config)` gives a Layout, and
                    `Layout.to_ours("transformer.h.3.attn.c_attn")` a Rule that says which of our modules the rows of that
                    module belong to (`rule.ours`), how to take its rows apart (`rule.split`) and how to put them together
                    (`rule.join`). `Layout.to_theirs("model.layers.3.self_attn.q_proj")` gives the same Rule from our side.
    folder.py       which files of a Hugging Face folder hold its weights. Torch-free.
    files.py        files of tensors: opened memory-mapped, written one tensor at a time
    torch_check.py  torch files, checked before and after torch reads them
    torch_file.py   torch files, written one tensor at a time
    huggingface.py  model folders: opened in place; written complete
    bitsandbytes.py weights of such folders in 4 or 8 bits, dequantised some rows at a time
    peft.py         PEFT adapter folders, read and written
    litgpt.py       litgpt's directories and adapters, read
    model_files.py  models as files of tensors, whatever they are models of: opened, and written in shards
    lora_files.py   LoRA files of ComfyUI, kohya and PEFT for whatever model: read into plain updates and written back
"""
