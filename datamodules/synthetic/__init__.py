"""The embedded benchmark: rendered inspection photographs of ten products with structural and logical defects."""

from datamodules.synthetic.sheet import contact_sheet
from datamodules.synthetic.writer import MANIFEST, VERSION, Plan, generate, render_defect, render_normal

__all__ = ["MANIFEST", "VERSION", "Plan", "contact_sheet", "generate", "render_defect", "render_normal"]
