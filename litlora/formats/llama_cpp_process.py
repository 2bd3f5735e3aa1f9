"""The process in which llama.cpp runs a GGUF file, by `litlora.worker`: native code that ends its
process where a file is broken, and writes to stderr as it likes.

The first question is {"model": file, "adapter": file or null, "context": tokens}; its answer is
{"version": of llama-cpp-python}. Or it is {"quantise": [file, file to write, number format]},
which is answered when that is done, and the end. The others are ["tokens", [texts, add_special]],
which answers the ids of each text, and ["logits", [ids, file]], which writes (ids, vocabulary) in fp32 into
an .npy file; ["stops", ids] answers which of the ids end generation. A failure is {"error": text}.
"""

import json
import os
import sys
from importlib.metadata import version
from typing import Any


def load(asked: dict[str, Any]) -> Any:
    import llama_cpp

    return llama_cpp.Llama(
        asked["model"],
        n_ctx=asked["context"],
        n_batch=asked["context"],
        n_threads=os.cpu_count(),
        logits_all=True,
        lora_path=asked["adapter"],
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )


def quantise(source: str, target: str, kind: str) -> None:
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings):
        raise RuntimeError("the quantiser fails")


def tokens(model: Any, argument: Any) -> list[list[int]]:
    texts, add_special = argument
    return [model.tokenize(text.encode(), add_bos=add_special, special=True) for text in texts]


def logits(model: Any, argument: Any) -> None:
    import numpy

    ids, file = argument
    model.reset()
    model.eval(ids)
    numpy.save(file, numpy.asarray(model.scores[: len(ids)], dtype=numpy.float32))


def stops(model: Any, ids: list[int]) -> list[int]:
    import llama_cpp

    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    return [number for number in ids if llama_cpp.llama_vocab_is_eog(vocabulary, number)]


METHODS = {"tokens": tokens, "logits": logits, "stops": stops}


def main() -> None:
    # llama.cpp prints to stdout, which is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model, question = None, json.loads(sys.stdin.readline())
    while True:
        try:
            if "quantise" in question:
                answer = {"answer": quantise(*question["quantise"])}
            elif model is None:
                model = load(question)
                answer = {"answer": {"version": version("llama-cpp-python")}}
            else:
                answer = {"answer": METHODS[question[0]](model, question[1])}
        except Exception as error:  # whatever the library raises is what the caller reports
            answer = {"error": " ".join(str(error).split())[:300]}
        print(json.dumps(answer), file=answers, flush=True)
        if model is None or not (line := sys.stdin.readline()):
            return
        question = json.loads(line)


if __name__ == "__main__":
    main()
