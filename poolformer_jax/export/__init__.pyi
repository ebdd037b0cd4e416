from .model_file import FORMATS as FORMATS, export_model as export_model
