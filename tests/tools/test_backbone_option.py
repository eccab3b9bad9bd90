def test_training_and_testing_with_another_backbone(run_tool, library_file, tmp_path):
    """A detector of mmdet with ResNet-18, of an eighth of its widths, trains with ViG-H-T and is tested with it."""
    file = library_file('mmdet')
    common = ['--backbone', 'vigh-gla-tiny', '--work-dir', tmp_path / 'work', '--progress', 'lines']
    options = ['--cfg-options', 'model.backbone.init_cfg=None', '+train_dataloader.dataset.indices=2']
    status, said = run_tool('train.py', file, *common, *options)
    assert status == 0
    assert "model.backbone.type: 'ResNet' -> 'mmvig.ViGH'" in said and 'model.neck.in_channels.3: 64 -> 768' in said
    status, said = run_tool('test.py', file, tmp_path / 'work/epoch_1.pth', *common, '--cfg-options', options[1])
    assert status == 0 and 'AP' in said
    status, said = run_tool('test.py', file, tmp_path / 'work/epoch_1.pth', '--undilate')
    assert status.startswith('--undilate: this is about exchanging the backbone')
