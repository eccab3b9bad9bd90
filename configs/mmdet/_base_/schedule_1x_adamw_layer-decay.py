# mmdet's 12 epochs with AdamW and layer-wise decay, as Vision-RWKV trains Mask R-CNN with a ViT-Adapter.
_base_ = 'mmdet::_base_/schedules/schedule_1x.py'

optim_wrapper = dict(
    constructor='mmvig.LayerDecayOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.85),
)
