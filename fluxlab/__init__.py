"""fluxlab: FLUX.1, the whole model, open to look into. ``import fluxlab as fl``."""

from fluxlab import speed
from fluxlab.config import VARIANTS, VERSION, AutoEncoderConfig, ConfigError, FluxConfig, Variant, variant
from fluxlab.course.exercise import check
from fluxlab.files import WeightsError
from fluxlab.inspect import plots
from fluxlab.inspect.capture import capture, patch
from fluxlab.inspect.compare import compare
from fluxlab.inspect.diagram import block_diagram, model_map
from fluxlab.inspect.explain import explain
from fluxlab.inspect.explore import explore
from fluxlab.inspect.graph import graph
from fluxlab.inspect.names import tensor_names
from fluxlab.inspect.sheet import cheat_sheet
from fluxlab.inspect.tables import flops, memory, parameter_table, summary
from fluxlab.inspect.tape import Tape
from fluxlab.inspect.working_memory import working_memory
from fluxlab.model.autoencoder import AutoEncoder
from fluxlab.model.embeddings import timestep_embedding
from fluxlab.model.rope import apply_rope, rope
from fluxlab.model.transformer import Flux, build
from fluxlab.onnx.export import export_onnx
from fluxlab.pipeline.inputs import FluxInputs, example_inputs
from fluxlab.pipeline.latents import image_ids, noise, pack, text_ids, unpack
from fluxlab.pipeline.load import load
from fluxlab.pipeline.pipeline import Pipeline
from fluxlab.pipeline.sampling import Step, denoise
from fluxlab.pipeline.schedule import schedule
from fluxlab.weights.load import load_weights

__version__ = VERSION

__all__ = ["VARIANTS", "AutoEncoderConfig", "ConfigError", "FluxConfig", "Variant", "WeightsError", "variant"]
__all__ += ["AutoEncoder", "Flux", "apply_rope", "build", "load_weights", "rope", "timestep_embedding"]
__all__ += ["FluxInputs", "Pipeline", "Step", "denoise", "example_inputs", "export_onnx", "load", "schedule"]
__all__ += ["image_ids", "noise", "pack", "text_ids", "unpack"]
__all__ += ["speed"]
__all__ += ["Tape", "capture", "check", "compare", "explain", "explore", "patch", "plots", "tensor_names"]
__all__ += ["block_diagram", "cheat_sheet", "flops", "graph", "memory", "model_map", "parameter_table", "summary"]
__all__ += ["working_memory"]
