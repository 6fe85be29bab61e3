"""Frozen vision encoders whose attention and features a student imitates."""

from haste.teachers.names import resolve_teacher
from haste.teachers.vision import TeacherOutput, VisionTeacher

__all__ = ["TeacherOutput", "VisionTeacher", "resolve_teacher"]
