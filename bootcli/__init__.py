"""bootcli: data-free distillation of diffusion teachers into one-step students."""

__version__ = "0.1.0"
