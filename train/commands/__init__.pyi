from .doctor import examine as examine, print_findings as print_findings
from .evaluate import EvaluateConfig as EvaluateConfig, run_evaluation as run_evaluation
from .throughput import consume as consume
