"""Student weights in and out: the formats people have, the names in them, and one loader for all."""

from afd.models.weights.accounting import check_names_and_shapes
from afd.models.weights.loading import StudentFile, fill_student, load_student, open_student, read_student_shape
from afd.models.weights.names import diffusers_name, original_name
from afd.models.weights.saving import read_student_note, save_student, stored_shape

__all__ = [
    "StudentFile",
    "check_names_and_shapes",
    "diffusers_name",
    "fill_student",
    "load_student",
    "open_student",
    "original_name",
    "read_student_note",
    "read_student_shape",
    "save_student",
    "stored_shape",
]
