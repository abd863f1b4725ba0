"""Runs a model on two devices that do not exist: torch's fake tensors know their device and refuse to mix two.

The modules are placed as `device_map="auto"` would on machines with less and less memory on the first device, and a
hook brings each module its inputs, as accelerate's do. A program of its own, because torch keeps a device once made.
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
    """Places at most `share` of the model on device 0, the rest on device 1. Returns the devices in use."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    memory = {0: int(size * share), 1: 2 * size}
    places = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=model._no_split_modules)
    fake: dict[torch.Tensor, torch.Tensor] = {}  # a tied weight stays one
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
    """Photos and word maps, with the model's own words and with others, all coming from device 0."""
    photos, maps = torch.randn(2, 3, 64, 80, device="fake:0"), torch.ones(2, 4, 4, dtype=torch.long, device="fake:0")
    ids, names = torch.ones(2, 5, dtype=torch.long, device="fake:0"), torch.ones(2, 3, 2, device="fake:0").long()
    words = {"input_ids": ids, "attention_mask": ids, "category_ids": names, "category_mask": names}
    for image in ({"pixel_values": photos}, {"word_map": maps}):
        assert model(**image).logits.shape == (2, 3, 4, 5 if "pixel_values" in image else 4)
        model(**image, **words)
    model.model(pixel_values=photos, input_ids=ids, attention_mask=ids, decoder_input_ids=ids, use_cache=False)


_setup_privateuseone_for_python_backend("fake")
make_tensor = torch.tensor  # the only operation that does not reach the fake tensors
torch.tensor = lambda *args, device=None, **kwargs: make_tensor(*args, **kwargs).to(device)
for decoder_positions in ("segmentation", "image"):
    for share in (0.3, 0.5, 0.7, 0.9):
        model = small_model(decoder_positions=decoder_positions)
        with FakeTensorMode(), torch.no_grad():
            assert spread(model, share) == {0, 1}
            run(model)
print("done")
