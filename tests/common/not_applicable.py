"""transformers' common tests that do not apply to this project, with the reasons. A failure is never a reason."""

from fnmatch import fnmatchcase

import torch

NOT_RUN = {
    "generation/test_utils.py and exporters/test_export.py": "not in the source distribution",
    "test_tokenization_common.py": "tests tokenizer classes; the project uses RobertaTokenizer of transformers",
}

ACCELERATOR = "needs an accelerator"
SEVERAL_ACCELERATORS = "needs several accelerators"
BIASES = "positions are biases of the attention logits, which flash and flex kernels do not support"
ONE_CONFIGURATION = "one configuration describes the whole model"
NO_EXPERTS = "no mixture of experts"
NO_ROTARY = "no rotary positions"
NO_DEEPSPEED = "the project does not use DeepSpeed"
NO_TENSOR_PARALLELISM = "no plan for tensor parallelism: the largest OFA has 0.9 billion parameters"
SAME_NAMES = "weights are saved under the names of the parameters, without conversion"
NO_FLOAT32 = "no part of the model must stay float32"
CLIP_AND_GPT2 = "transformers does not run it for CLIP and GPT-2, which initialise their weights"
NO_CROSS_ATTENTION = "GPT-2 reads the embeddings of a patch, and no output of an encoder"
OTHER_TASK = "a task that the model does not perform, or whose pipeline does not support its inputs"
CATEGORIES = "the processor takes category words, not texts, and no settings of a tokenizer"
CHAT = "the model does not chat"
MODALITIES = "the processor takes neither videos nor audio"
IMAGE_TOKENS = "images have no placeholder tokens in the text"

# Reasons by "class.test" or "test" (in every class); * is a wildcard. The tests run nevertheless: an entry whose test
# passes, or that matches no test, is an error.
NOT_APPLICABLE = {
    # models
    "test_can_load_with_device_context_manager": ACCELERATOR,
    "test_can_load_with_global_device_set": ACCELERATOR,
    "test_cpu_offload": ACCELERATOR,
    "test_disk_offload_*": ACCELERATOR,
    "test_sdpa_can_compile_dynamic": ACCELERATOR,
    "test_torch_compile_for_training": ACCELERATOR,
    "test_model_parallelism": SEVERAL_ACCELERATORS,
    "test_flash_attn_*": BIASES,
    "test_flex_attention_with_grads": BIASES,
    "test_sdpa_can_dispatch_on_flash": BIASES,
    "test_kernels_can_load_without_crashing": "none of the layers has a kernel on the Hub",
    "test_attn_implementation_composite_models": ONE_CONFIGURATION,
    "test_can_set_attention_dynamically_composite_model": ONE_CONFIGURATION,
    "OFAModelTest.test_internal_model_config_and_subconfig_are_same": ONE_CONFIGURATION,
    "test_sdpa_can_dispatch_composite_models": ONE_CONFIGURATION,
    "test_eager_matches_batched_and_grouped_inference_*": NO_EXPERTS,
    "test_moe_models_record_router_logits": NO_EXPERTS,
    "test_output_router_logits_from_config": NO_EXPERTS,
    "test_model_rope_*": NO_ROTARY,
    "test_vision_axial_rope": NO_ROTARY,
    "test_resize_*_with_deepspeed*": NO_DEEPSPEED,
    "test_tied_head_has_a_tp_plan_entry": NO_TENSOR_PARALLELISM,
    "test_tp_plan_matches_params": NO_TENSOR_PARALLELISM,
    "[!C]*.test_can_load_from_already_mapped_keys": SAME_NAMES,  # CLIP's weights are converted
    "test_reverse_loading_mapping": SAME_NAMES,
    "test_keep_in_fp32_modules*": NO_FLOAT32,
    "test_sliding_window_mask": "every token attends to all others",
    "test_resize_position_vector_embeddings": "texts have a fixed number of positions, and images interpolate theirs",
    "test_causal_lm_loss_honors_shift_labels": "an encoder-decoder's logits are aligned with the labels",
    "test_can_capture_specific_layers_hidden_states": "an encoder-decoder has no output `hidden_states`",
    "OFAModelTest.test_generation_tester_mixin_inheritance": "the generation tests are not shipped",
    "*SemanticSegmentationTest.test_encoder_decoder_loss_no_double_shift": "no text is predicted",
    "*SemanticSegmentationTest.test_torch_save_load": "its base is the backbone, which AutoModel does not load",
    "*SemanticSegmentationTest.test_inputs_embeds": "the prompt is passed as ids",
    "ClipCapForSemanticSegmentationTest.test_can_init_all_missing_weights": CLIP_AND_GPT2,
    "ClipCapForSemanticSegmentationTest.test_retain_grad_hidden_states_attentions": NO_CROSS_ATTENTION,
    # image processor
    "test_call_numpy_4_channels": "the trunk reads RGB: transparent images are laid on white",
    "test_can_compile_torchvision_backend": "the image processor always uses NumPy and Pillow",
    "test_image_processor_preprocess_arguments": "for processors older than `valid_kwargs`",
    "test_override_instance_attributes_does_not_affect_other_instances": "`size` is no dict, but a SizeDict",
    "test_pil_can_run_without_torchvision": "its subprocess loads classes of transformers only, without remote code",
    # processor
    "test_model_input_names": CATEGORIES,
    "IFSegProcessorTest.test_subprocessor_defaults_0_text": "the processor normalises text, the tokenizer does not",
    "test_flat_kwarg_applied_when_modality_dict_lacks_it": CATEGORIES,
    "test_kwargs_overrides_default_subprocessor_kwargs_0_images": CATEGORIES,
    "test_overlapping_text_image_kwargs_handling_0_images": CATEGORIES,
    "test_structured_kwargs_nested_from_dict_0_images": CATEGORIES,
    "test_subprocessor_defaults_preserved_by_kwargs_0_images": CATEGORIES,
    "test_unstructured_kwargs_0_images": CATEGORIES,
    "test_unstructured_kwargs_batched_0_images": CATEGORIES,
    "IFSegProcessorTest.*_videos": MODALITIES,
    "IFSegProcessorTest.*_[23]_audio": MODALITIES,
    "test_apply_chat_template_*": CHAT,
    "IFSegProcessorTest.test_chat_template_*": CHAT,
    "test_get_num_multimodal_tokens_matches_processor_call*": IMAGE_TOKENS,
    "test_if_input_has_mismatching_tokens_and_mm_data": IMAGE_TOKENS,
    "test_processor_text_has_no_visual": IMAGE_TOKENS,
    "test_replacement_offsets": IMAGE_TOKENS,
    # pipelines
    "test_pipeline_[!i]*": OTHER_TASK,
    "test_pipeline_image_[!s]*": OTHER_TASK,
}
if torch.cuda.is_available():
    NOT_APPLICABLE = {pattern: why for pattern, why in NOT_APPLICABLE.items() if why != ACCELERATOR}
if torch.cuda.device_count() > 1:
    NOT_APPLICABLE = {pattern: why for pattern, why in NOT_APPLICABLE.items() if why != SEVERAL_ACCELERATORS}


def matches(pattern: str, item) -> bool:
    """Whether an entry of the list matches a test."""
    name = f"{item.cls.__name__}.{item.name}" if item.cls else item.name
    return fnmatchcase(name, pattern if "." in pattern else f"*.{pattern}")


def reason(item) -> str | None:
    """The reason why a test does not apply, or None."""
    return next((why for pattern, why in NOT_APPLICABLE.items() if matches(pattern, item)), None)
