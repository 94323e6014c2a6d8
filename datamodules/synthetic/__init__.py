"""The embedded benchmark: rendered inspection photographs of ten products with structural and logical defects."""

from datamodules.synthetic.generate import MANIFEST, VERSION, Plan, generate, render_defect, render_normal

__all__ = ["MANIFEST", "VERSION", "Plan", "generate", "render_defect", "render_normal"]
