"""Frozen vision encoders whose attention and features a student imitates."""

from haste.teachers.encoder import TeacherOutput, VisionTeacher
from haste.teachers.families import resolve_teacher

__all__ = ["TeacherOutput", "VisionTeacher", "resolve_teacher"]
