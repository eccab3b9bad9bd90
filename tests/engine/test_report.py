import numpy as np
from rich.console import Console

from mmvig.engine.report import main_metrics, metrics_table, say


def text(metrics: dict) -> list[list[str]]:
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(metrics_table(metrics))
    rows = [line for line in capture.get().splitlines() if any(character.isalnum() for character in line)]
    return [[cell.strip() for cell in line.strip('┃│').replace('┃', '│').split('│')] for line in rows]


def test_coco_metrics_are_a_row_for_boxes_and_one_for_masks():
    values = {'': 0.41234, '_50': 0.6, '_75': 0.45, '_s': -1.0, '_m': 0.3, '_l': 0.5}
    metrics = {f'coco/bbox_mAP{suffix}': value for suffix, value in values.items()}
    metrics |= {f'coco/segm_mAP{suffix}': value / 2 for suffix, value in values.items() if value > 0}
    assert text(metrics) == [
        ['', 'AP', 'AP50', 'AP75', 'AP small', 'AP medium', 'AP large'],
        ['box', '0.4123', '0.6', '0.45', '-', '0.3', '0.5'],
        ['mask', '0.2062', '0.3', '0.225', '-', '0.15', '0.25'],
    ]


def test_other_metrics_are_a_row_each():
    assert text({'mIoU': 44.5, 'accuracy/top1': 81.23456}) == [
        ['metric', 'value'],
        ['mIoU', '44.5'],
        ['accuracy/top1', '81.23'],
    ]


def test_main_metrics():
    metrics = {'coco/bbox_mAP': 0.4, 'coco/bbox_mAP_50': 0.6, 'coco/bbox_mAP_s': 0.1, 'some_s': 1, 'text': 'x'}
    assert main_metrics(metrics) == {'coco/bbox_mAP': 0.4, 'coco/bbox_mAP_50': 0.6, 'some_s': 1}
    assert main_metrics({'mIoU': np.float32(44.5)}) == {'mIoU': 44.5}


def test_one_process_speaks(capsys, monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    say('one', 'two')
    monkeypatch.setenv('RANK', '1')
    say('three')
    assert capsys.readouterr().out == 'one\ntwo\n'
