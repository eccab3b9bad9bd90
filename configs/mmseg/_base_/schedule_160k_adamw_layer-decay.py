# As schedule_160k_adamw.py with layer-wise decay, as Vision-RWKV trains UperNet with a ViT-Adapter.
_base_ = './schedule_160k_adamw.py'

optim_wrapper = dict(
    constructor='mmvig.LayerDecayOptimWrapperConstructor', paramwise_cfg=dict(_delete_=True, layer_decay_rate=0.85)
)
