from .exported_file import ExportedFile as ExportedFile, open_exported as open_exported, verify_file as verify_file
from .model_file import FORMATS as FORMATS, export_model as export_model
