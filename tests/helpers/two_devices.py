"""Runs a model split over two fake devices: torch's fake tensors have a device and refuse to be mixed across two.

Modules are placed as `device_map="auto"` would place them with different amounts of memory on the first device, and
hooks move the inputs of each module to its device, as accelerate's hooks do. This is a separate program because a
device type registered with torch stays registered.
"""

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from checkpoints import small_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers.integrations.accelerate import infer_auto_device_map


class SendTo(ModelHook):
    def __init__(self, device: str):
        self.device = device

    def pre_forward(self, module, *args, **kwargs):
        return send_to_device(args, self.device), send_to_device(kwargs, self.device)


def spread(model: torch.nn.Module, share: float) -> set[int]:
    """Places at most `share` of the model on device 0 and the rest on device 1; returns the devices used."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    memory = {0: int(size * share), 1: 2 * size}
    places = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=model._no_split_modules)
    fake: dict[torch.Tensor, torch.Tensor] = {}  # keeps tied weights tied
    for name, module in model.named_modules():
        place = next((x for x in places if f"{name}.".startswith(f"{x}.") or not x), None)
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    device = places[f"{name}.{key}" if place is None else place]
                    moved = type(tensor)(torch.empty(tensor.shape, device=f"fake:{device}"))
                    tensors[key] = fake.setdefault(tensor, moved)
        if place is not None:
            add_hook_to_module(module, SendTo(f"fake:{places[place]}"))
    return set(places.values())


def run(model: torch.nn.Module):
    """Runs images and word maps, with the categories of the model and with others; all inputs are on device 0."""
    images, maps = torch.randn(2, 3, 64, 80, device="fake:0"), torch.ones(2, 4, 4, dtype=torch.long, device="fake:0")
    ids, names = torch.ones(2, 5, dtype=torch.long, device="fake:0"), torch.ones(2, 3, 2, device="fake:0").long()
    words = {"input_ids": ids, "attention_mask": ids, "category_ids": names, "category_mask": names}
    for inputs in ({"pixel_values": images}, {"word_map": maps}):
        assert model(**inputs).logits.shape == (2, 3, 4, 5 if "pixel_values" in inputs else 4)
        model(**inputs, **words)
    model.backbone.model(pixel_values=images, input_ids=ids, attention_mask=ids, decoder_input_ids=ids, use_cache=False)


_setup_privateuseone_for_python_backend("fake")
make_tensor = torch.tensor  # the only operation that bypasses the fake tensors
torch.tensor = lambda *args, device=None, **kwargs: make_tensor(*args, **kwargs).to(device)
for decoder_positions in ("segmentation", "image"):
    for share in (0.3, 0.5, 0.7, 0.9):
        model = small_model(decoder_positions=decoder_positions)
        with FakeTensorMode(), torch.no_grad():
            assert spread(model, share) == {0, 1}
            run(model)
print("done")
