"""The commands other than training: evaluate, doctor, throughput."""

from typing import TYPE_CHECKING

from poolformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from train.commands.doctor import examine as examine
    from train.commands.doctor import print_findings as print_findings
    from train.commands.evaluate import EvaluateConfig as EvaluateConfig
    from train.commands.evaluate import run_evaluation as run_evaluation
    from train.commands.throughput import consume as consume

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "doctor": "examine print_findings",
        "evaluate": "EvaluateConfig run_evaluation",
        "throughput": "consume",
    },
)
