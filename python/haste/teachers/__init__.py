"""Frozen vision encoders, whose attention and features a model is aligned with."""

from haste.teachers.encoder import TeacherOutput, VisionTeacher
from haste.teachers.families import resolve_teacher

__all__ = ["TeacherOutput", "VisionTeacher", "resolve_teacher"]
