"""Makes distill.safetensors: what TRL's generalized_jsd_loss with beta 0 says of some logits, the
divergence of a student from its teacher, and the gradient of the student's logits.

    pip install trl==1.16.0 transformers==5.23.0 accelerate && python tests/trl_files/make_distill.py
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from trl.experimental.gkd import GKDTrainer


def main() -> None:
    torch.manual_seed(0)
    student, teacher = (2 * torch.randn(1, 7, 23) for _ in range(2))
    labels = torch.tensor([[-100, 3, 1, -100, 5, 0, 22]])
    found = {"student": student, "teacher": teacher, "labels": labels}
    for name, temperature in (("plain", 1.0), ("warm", 2.5)):
        logits = student.clone().requires_grad_()
        loss = GKDTrainer.generalized_jsd_loss(
            logits, teacher, labels, beta=0.0, temperature=temperature, reduction="sum"
        )
        loss.backward()
        found |= {f"{name}.loss": loss.detach().reshape(1), f"{name}.gradient": logits.grad}
    save_file(found, Path(__file__).with_name("distill.safetensors"))


if __name__ == "__main__":
    main()
