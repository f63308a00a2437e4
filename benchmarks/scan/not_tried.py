"""Arguments that the scan does not try, and why."""

IMAGES = """
    actions aspect_ratio_ids aspect_ratio_mask batch_num_images downsample_mode flattened_patches height high_res_pixel_values
    image_attention_mask image_embeds image_embeds_position_mask image_encoder_embeddings image_grid_hw image_grid_thw image_grids
    image_hidden_states image_merge_sizes image_num_crops image_outputs image_patches image_patches_indices image_pixel_values
    image_position_ids image_sizes image_sizes_videos image_token_pooling interpolate_pos_encoding num_frames_per_video
    num_local_patches patches_grid perceiver_embeddings pixel_attention_mask pixel_mask pixel_values pixel_values_images
    pixel_values_local pixel_values_videos qformer_attention_mask qformer_input_ids rope_deltas router_labels second_grid_thw
    second_per_grid_ts spatial_shapes target_sizes target_sizes_videos tile_fine_mask video_compression_mask video_grid_thw
    video_grids video_merge_sizes video_position_ids video_token_pooling vision_aspect_ratio vision_feature_layer
    vision_feature_layers vision_feature_select_strategy width
"""
SOUND = """
    audio_attention_mask audio_codes audio_embed_sizes audio_feature_lengths audio_input_features audio_input_ids
    audio_input_ids_mask feature_attention_mask input_features input_features_mask input_values moshi_audio_codes padding_mask
    use_audio_in_video user_audio_codes video_second_per_grid
"""
MADE_ELSEWHERE = """
    cross_attention_mask cross_attention_states decoder_attention_mask decoder_input_ids decoder_inputs_embeds encoder_outputs
    full_text_row_masked_out_mask mm_encoder_outputs per_layer_inputs protein_attention_mask protein_input_ids shared_kv_states
"""

NOT_TRIED = {
    **dict.fromkeys(IMAGES.split(), "an image or a video"),
    **dict.fromkeys(SOUND.split(), "sound"),
    **dict.fromkeys(MADE_ELSEWHERE.split(), "made by another model"),
    **dict.fromkeys(("input_ids", "attention_mask"), "in every case, or in those with padding"),
}
