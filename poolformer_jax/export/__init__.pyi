from .exported_file import verify_file as verify_file
from .model_file import FORMATS as FORMATS, export_model as export_model
