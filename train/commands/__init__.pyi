from .doctor import examine as examine, print_findings as print_findings
from .evaluate import run_evaluation as run_evaluation
from .evaluate_config import EvaluateConfig as EvaluateConfig
from .probe import ProbeConfig as ProbeConfig, run_probe as run_probe
from .show import show_batch as show_batch
from .throughput import ThroughputConfig as ThroughputConfig, consume as consume, run_throughput as run_throughput
