"""Lets SGLang's CUDA build start on a machine without CUDA; tests only, loaded through a .pth file by every interpreter of the environment.

SGLang imports two compiled packages that have no CPU build, although a text model on a CPU never calls them:
`sgl_kernel`, for which any name can be imported and none be called, and torchvision's operators, whose Python side
registers shape functions for operators that its CUDA library would have declared.
"""

import importlib.machinery
import sys
import types
from pathlib import Path


class _KernelStandIn(types.ModuleType):
    """`from sgl_kernel import anything` works; calling it raises. Not a package: `import sgl_kernel.x` fails, and SGLang handles that."""

    __version__ = "0.0.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args, **kwargs):
            raise NotImplementedError(f"sgl_kernel.{name} needs CUDA; this environment runs SGLang on a CPU")

        return absent


class _CpuFinder:
    """Import hook for the two packages; everything else takes its usual way."""

    def __init__(self):
        self.declared = None  # kept: the operators live as long as this object

    def find_spec(self, name, path=None, target=None):
        if name == "sgl_kernel":
            return importlib.machinery.ModuleSpec(name, self)
        if name == "torchvision" and self.declared is None:
            self._declare_torchvision_ops()
        return None

    def _declare_torchvision_ops(self):
        import torch

        spec = importlib.machinery.PathFinder.find_spec("torchvision")
        for library in Path(spec.origin).parent.glob("_C*.so") if spec and spec.origin else ():
            try:
                torch.ops.load_library(str(library))
                return  # a CPU build of torchvision: it declares its own
            except OSError:
                continue
        self.declared = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            self.declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

    def create_module(self, spec):
        return _KernelStandIn(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _CpuFinder())
