"""Other people's tools on these networks, unchanged: what they compute is what timm computes.

TIMM_SCRIPTS names the folder of a timm checkout; without it the tests of timm's own scripts are not collected.
"""
import csv
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hub_server import Hub, running
from PIL import Image
from safetensors.torch import load_file, save_file
from test_data import png
from timm.data import create_transform, resolve_model_data_config
from torchvision.models.feature_extraction import create_feature_extractor

from timm_lm import data as data_module
from timm_lm.data import open_images
from timm_lm.errors import UserError
from timm_lm.models._weights import weights_dir
from timm_lm.training.batches import create_loader, load_split
from timm_lm.training.options import parse_options

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = weights_dir() / 'lm_resnet20.best_c10'
SCRIPTS = os.environ.get('TIMM_SCRIPTS')
CLOSE = dict(rtol=1e-5, atol=1e-5)  # float32, another order of the same sums


def needs(*names):
    """Import tools. With REQUIRE_TOOLS, which CI sets, a missing one is an error; else its test is skipped."""
    if os.environ.get('REQUIRE_TOOLS'):
        return [importlib.import_module(name) for name in names]
    return [pytest.importorskip(name, exc_type=ImportError) for name in names]


@pytest.fixture
def model():
    """The shipped network, loaded by timm."""
    return timm.create_model(f'local-dir:{SHIPPED}', pretrained=True).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='session')
def photo():
    """An image of 48x40 pixels with large shapes, which has to be resized and cropped."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC)


def timm_probabilities(photo):
    """Class probabilities of an image by timm alone."""
    model = timm.create_model(f'local-dir:{SHIPPED}', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    names = model.pretrained_cfg['label_names']
    with torch.inference_mode():
        return dict(zip(names, model(transform(photo)[None]).softmax(1)[0].tolist(), strict=True))


def fresh_python(code, *args, cwd, **env):
    """Run code in a fresh interpreter, in which nobody but the plug-in hook imports this package; returns its output.

    The home folder and the caches are in `cwd`.
    """
    inherited = {name: value for name, value in os.environ.items()
                 if not name.startswith(('HF_', 'HUGGING', 'TORCH_')) and name != 'TIMM_LM_AUTOLOAD'}
    result = subprocess.run(
        [sys.executable, '-c', code, *map(str, args)], cwd=cwd, capture_output=True, text=True,
        env=inherited | dict(HF_HOME=str(cwd / 'hf'), TORCH_HOME=str(cwd / 'torch')) | env)
    assert result.returncode == 0, result.stderr
    return result.stdout


# transformers


def test_transformers_gives_the_logits_of_timm(model, images):
    transformers, = needs('transformers')
    theirs = transformers.AutoModelForImageClassification.from_pretrained(SHIPPED).eval()
    assert load_file(SHIPPED / 'model.safetensors')['head.fc.bias'].dtype == torch.float16
    assert theirs.dtype == torch.float32
    with torch.inference_mode():
        torch.testing.assert_close(theirs(images).logits, model(images), rtol=1e-5, atol=1e-6)
    assert list(theirs.config.id2label.values()) == model.pretrained_cfg['label_names']


def test_transformers_trains_k(images):
    transformers, = needs('transformers')
    theirs = transformers.AutoModelForImageClassification.from_pretrained(SHIPPED).train()
    out = theirs(images, labels=torch.tensor([1, 2]))
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, torch.tensor([1, 2])))
    out.loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if name.endswith('.step.k')}
    assert len(grads) == len(theirs.timm_model.k_values()) and all(grad.abs().max() > 0 for grad in grads.values())


def test_pipeline_prepares_the_image_and_names_the_classes(photo):
    transformers, = needs('transformers')
    answers = transformers.pipeline('image-classification', model=str(SHIPPED), device='cpu')(photo, top_k=10)
    expected = timm_probabilities(photo)
    assert answers[0]['label'] == max(expected, key=expected.get)
    assert {answer['label']: answer['score'] for answer in answers} == pytest.approx(expected, rel=1e-4, abs=1e-6)


# datasets


def test_large_parquet_through_datasets(tmp_path, monkeypatch):
    """As it is read from 4 GiB on: the same images and labels, also of a part and in batches."""
    datasets, = needs('datasets')
    folder = tmp_path / 'Images'  # older timm turns names into lower case
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (('train', 12), ('test', 8)):
        arrays = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(count)]
        table = pa.table(dict(img=[dict(bytes=png(array), path=None) for array in arrays],
                              coarse_label=[0] * count, fine_label=[i % 4 for i in range(count)]))
        features = dict(img={'_type': 'Image'}, coarse_label={'_type': 'Value', 'dtype': 'int64'},
                        fine_label={'_type': 'ClassLabel', 'names': ['cat', 'dog', 'hog', 'pig']})
        metadata = dict(huggingface=json.dumps(dict(info=dict(features=features))))
        pq.write_table(table.replace_schema_metadata(metadata), folder / f'{split}-00000-of-00001.parquet')

    def read(split, **keys):
        opened = open_images(split, folder, **keys)
        return opened.labels.tolist(), opened.class_names, [np.asarray(image).tolist() for image, _ in opened]

    def batches():
        args = parse_options(['--data-dir', str(folder), '--loader', 'timm', '--workers', '1', '--batch-size', '4'])
        config = dict(input_size=(3, 32, 32), crop_pct=1., interpolation='bilinear', mean=(.5,) * 3, std=(.2,) * 3)
        data = load_split(args, 'train', config, False, True)
        return list(create_loader(args, data, config, Accelerator(cpu=True), 4, True))

    def arrow_files():
        """Of the package datasets; other tests may have left some."""
        return {*Path(os.environ['HF_DATASETS_CACHE']).rglob('*.arrow')}

    cases, before = [('test', {}), ('test[:50%]', {}), ('train[4:]', dict(target_key='fine_label'))], arrow_files()
    own = [read(split, **keys) for split, keys in cases], batches()
    assert arrow_files() == before
    monkeypatch.setattr(data_module, 'MEMORY_LIMIT', 0)
    theirs = [read(split, **keys) for split, keys in cases], batches()
    assert arrow_files() > before
    assert theirs[0] == own[0] and len(own[1]) == 3
    for (images, labels), (expected, wanted) in zip(theirs[1], own[1], strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, wanted)
    query = Mock(side_effect=datasets.arrow_dataset.query_table)
    monkeypatch.setattr('datasets.arrow_dataset.query_table', query)
    open_images('train', folder)
    assert query.call_count == 1  # all labels at once: one by one, 100,000 take minutes


def test_large_parquet_that_is_damaged_is_named(tmp_path, monkeypatch, fails):
    needs('datasets')
    monkeypatch.setattr(data_module, 'MEMORY_LIMIT', 0)
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    table = pa.table(dict(image=[dict(bytes=png(image), path=None)] * 4, label=[0] * 4))
    paths = [tmp_path / 'data' / f'train-0000{shard}-of-00002.parquet' for shard in range(2)]
    paths[0].parent.mkdir()
    for damaged, message in zip(paths, ('is not a readable Parquet file', "timm could not open the split 'train'")):
        for path in paths:
            pq.write_table(table, path)
        damaged.write_bytes(damaged.read_bytes()[:-20])
        line = fails('train', '--data-dir', paths[0].parent, '--loader', 'timm', '--val-split', '', '--num-classes', 1,
                     '--model', 'lm_resnet20', '--dry-run')
        assert message in line
    for path in paths:
        pq.write_table(table.set_column(1, 'label', pa.array([0, 0, 0, None])), path)
    with pytest.raises(UserError, match="timm could not open the split 'train'"):
        open_images('train', paths[0].parent)


# segmentation-models-pytorch


def test_unet_encodes_with_the_network_and_trains_it(tmp_path):
    smp, = needs('segmentation_models_pytorch')
    torch.manual_seed(0)
    network = timm.create_model('lm_resnet50', k_init=(-0.9, -0.5)).eval()
    save_file(network.state_dict(), tmp_path / 'model.safetensors')
    unet = smp.Unet('tu-lm_resnet50', encoder_weights=True, classes=3,
                    pretrained_cfg_overlay=dict(file=str(tmp_path / 'model.safetensors'))).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        same, *features = unet.encoder(x)
        expected = network.forward_intermediates(x, intermediates_only=True)
    assert same is x and unet.encoder.out_channels == [3, 64, 256, 512, 1024, 2048]
    assert [feature.shape[-1] for feature in features] == [32, 16, 8, 4, 2]
    for feature, state in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, state, **CLOSE)

    masks = unet.train()(x)
    assert masks.shape == (2, 3, 64, 64)
    masks.pow(2).mean().backward()
    grads = {name: p.grad for name, p in unet.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None] == []
    k_grads = [grad for name, grad in grads.items() if name.endswith('.step.k')]
    assert len(k_grads) == len(network.k_values()) and all(grad.abs().max() > 0 for grad in k_grads)


def test_other_segmentation_networks():
    smp, = needs('segmentation_models_pytorch')
    x = torch.randn(1, 4, 64, 64)
    with torch.no_grad():
        dilated = smp.DeepLabV3Plus('tu-lm_resnet18', encoder_weights=None, encoder_output_stride=16, in_channels=4)
        assert dilated.eval().encoder(x)[-1].shape == (1, 512, 4, 4) and dilated(x).shape == (1, 1, 64, 64)
        shallow = smp.Unet('tu-lm_resnext50_32x4d', encoder_depth=3, encoder_weights=None, in_channels=4,
                           decoder_channels=(32, 16, 8))
        assert len(shallow.eval().encoder(x)) == 4 and shallow(x).shape == (1, 1, 64, 64)


# Grad-CAM


def unit_range(maps):
    """Scale each map of shape (N, H, W) to 0..1."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / maps.amax((1, 2), keepdim=True)


def test_grad_cam_of_the_features(model, images):
    cams, = needs('pytorch_grad_cam')
    with cams.GradCAM(model=model, target_layers=[model.norm]) as cam:
        heat = torch.from_numpy(cam(input_tensor=images, targets=None))
    assert heat.shape == (2, 32, 32) and heat.isfinite().all()
    assert heat.std(dim=(1, 2)).min() > 0.1
    with torch.no_grad():  # behind average pooling the gradient of a logit is the weight of its class
        features = model.forward_features(images)
        weights = model.head.fc.weight[model.forward_head(features).argmax(1)]
        expected = unit_range((weights * features).sum(1).clamp(min=0))
        expected = unit_range(F.interpolate(expected[None], (32, 32), mode='bilinear')[0])
    torch.testing.assert_close(heat, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize('method', ['GradCAM', 'LayerCAM', 'EigenCAM'])
@pytest.mark.parametrize('stage', [1, 2])
def test_heat_map_of_a_state(stage, method, model, images):
    cams, = needs('pytorch_grad_cam')
    with getattr(cams, method)(model=model, target_layers=[model.stages[stage].blocks[-1].step]) as cam:
        heat = cam(input_tensor=images, targets=None)
    assert heat.shape == (2, 32, 32) and np.isfinite(heat).all()
    assert heat.min() >= 0 and heat.max() <= 1 and heat.std(axis=(1, 2)).min() > 0.01


# torchvision


@pytest.mark.parametrize('name', ['lm_resnet20', 'lm_resnext29_8x64d', 'lm_resnet18'])
def test_extractor_of_torchvision_gives_the_states(name):
    torch.manual_seed(0)
    tiny = dict(lm_resnext29_8x64d=dict(layers=(1, 2, 1), channels=(32, 64, 64), stem_chs=16, cardinality=2))
    model = timm.create_model(name, k_init=(-0.9, -0.5), **tiny.get(name, {})).eval()
    stages = [f'stages.{i}' for i in range(len(model.stages))]
    extractor = create_feature_extractor(model, [*stages, 'norm', 'head'])
    for size in (2, 5):
        x = torch.randn(size, 3, 64, 64)
        with torch.no_grad():
            out = extractor(x)
            final, (_, *states) = model.forward_intermediates(x)
            for stage, state in zip(stages, states, strict=True):
                torch.testing.assert_close(out[stage], state, **CLOSE)
            torch.testing.assert_close(out['norm'], final, **CLOSE)
            torch.testing.assert_close(out['norm'], model.forward_features(x), **CLOSE)
            torch.testing.assert_close(out['head'], model(x), **CLOSE)


# The page of the manual

# Publishes the folder, then runs each block in a namespace of its own
RUNNER = """
import contextlib, io, json, sys, traceback

blocks = json.loads(sys.argv[1])
printed = {}
for heading, code in blocks.items():
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(code, heading, 'exec'), {'__name__': '__main__'})
        printed[heading] = out.getvalue().splitlines()[-1]
    except Exception:
        printed[heading] = traceback.format_exc()
print('\\n' + json.dumps(printed))
"""


def blocks_of_the_page():
    """The Python block of each section of docs/tools.md that has one, by heading."""
    page = (ROOT / 'docs' / 'tools.md').read_text(encoding='utf-8')
    blocks = {}
    for section in page.split('\n## ')[1:]:
        heading, _, text = section.partition('\n')
        code = re.findall(r'(?ms)^```python\n(.*?)^```$', text)
        assert len(code) <= 1, heading
        if code:
            blocks[heading] = code[0]
    return blocks


def test_the_page_in_an_interpreter_that_never_asks_for_this_package(photo, tmp_path):
    needs('transformers', 'segmentation_models_pytorch', 'pytorch_grad_cam', 'onnxruntime')
    photo.save(tmp_path / 'photo.png')
    (tmp_path / 'timm-lm').symlink_to(ROOT)
    hub = Hub()
    hub.add('OWNER/NAME', SHIPPED)  # what a push puts there is the same, byte for byte
    with running(hub):
        out = fresh_python(RUNNER, json.dumps(blocks_of_the_page()), cwd=tmp_path, HF_ENDPOINT=hub.endpoint,
                           HF_HUB_DISABLE_XET='1')
    probabilities = timm_probabilities(photo)
    assert json.loads(out.splitlines()[-1]) == {
        'transformers': max(probabilities, key=probabilities.get),
        'segmentation-models-pytorch': '(2, 3, 64, 64)',
        'Grad-CAM': '(2, 32, 32)',
        "torchvision's feature extractor": str(
            {'stages.0': (2, 16, 32, 32), 'stages.1': (2, 32, 16, 16), 'norm': (2, 64, 8, 8)}),
        'ONNX Runtime': '(5, 10)',
        'torch.hub': '10',
    }
    assert 'GET /OWNER/NAME/resolve' in ' '.join(hub.log)  # transformers loaded the repo, not a folder


# timm's own scripts


def run_script(name, *args, cwd):
    """Run a script of timm; returns its output, standard error included."""
    result = subprocess.run(
        [sys.executable, str(Path(SCRIPTS).absolute() / name), *map(str, args)], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout
    return result.stdout


def script_result(output):
    """The JSON that validate.py and benchmark.py print at the end."""
    return json.loads(output.split('--result\n')[1])


class TestScriptsOfTimm:
    __test__ = bool(SCRIPTS)

    def test_validate_counts_the_errors_of_the_run(self, run_folder, few_digits, tmp_path):
        """Two implementations of the evaluation, timm's loader and ours, on the same 64 images."""
        table = pq.read_table(next(few_digits.glob('test-*.parquet')))
        for i, row in enumerate(table.to_pylist()):
            folder = tmp_path / 'validation' / str(row['label'])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f'{i}.png').write_bytes(row['image']['bytes'])
        out = run_script('validate.py', '--model', f"local-dir:{run_folder / 'weights'}", '--data-dir', tmp_path,
                         '--in-chans', 1, '--device', 'cpu', '-j', 1, '-b', 16, cwd=tmp_path)
        expected = json.loads((run_folder / 'result.json').read_text())
        assert script_result(out)['top1'] == pytest.approx(expected['top1'], abs=1e-3)

    def test_train_takes_a_recipe_as_it_is(self, few_digits, tmp_path, command):
        """Unmodified, by Accelerate's launcher; the rates of its epochs are ours."""
        recipe = command('recipe', 'demo_digits', '--path')[1].strip()
        options = ['-c', recipe, '--epochs', 4, '--model-kwargs', 'layers=(1,1,1)', '--output', tmp_path]
        launch = ['accelerate.commands.launch', '--cpu', '--num_processes', 1, '--mixed_precision', 'no',
                  '--dynamo_backend', 'no', Path(SCRIPTS).absolute() / 'train.py']
        done = subprocess.run([sys.executable, '-m', *map(str, [
            *launch, *options, '--dataset', f'hfds/{few_digits}', '--device', 'cpu', '--experiment', 'theirs'])],
            cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
        assert done.returncode == 0, done.stdout
        code, _, err = command('train', *options, '--data-dir', few_digits, '--experiment', 'ours')
        assert code == 0, err
        theirs, ours = (
            [float(row['lr']) for row in csv.DictReader((tmp_path / name / 'summary.csv').read_text().splitlines())]
            for name in ('theirs', 'ours'))
        assert len(theirs) == 4 and theirs == pytest.approx(ours)

    def test_validate_takes_a_name(self, photo, tmp_path):
        probabilities = timm_probabilities(photo)
        for name in probabilities:  # the same image once for each class, and twice for the class that the network gives
            folder = tmp_path / 'validation' / name
            folder.mkdir(parents=True)
            for i in range(2 if name == max(probabilities, key=probabilities.get) else 1):
                photo.save(folder / f'{i}.png')
        out = run_script('validate.py', '--model', SHIPPED.name, '--data-dir', tmp_path, '--device', 'cpu', '-j', 1,
                         cwd=tmp_path)
        assert script_result(out)['top1'] == pytest.approx(100 * 2 / 11, abs=1e-3)

    def test_benchmark_runs_inference_and_training(self, tmp_path):
        out = run_script('benchmark.py', '--model', 'lm_resnet20', '--device', 'cpu', '-b', 4, '--num-warm-iter', 1,
                         '--num-bench-iter', 5, cwd=tmp_path)
        result = script_result(out)
        assert result['model'] == 'lm_resnet20' and result['param_count'] == 0.27  # 272,384 parameters
        assert result['infer_img_size'] == result['train_img_size'] == 32
        assert result['infer_samples_per_sec'] > 0 and result['train_samples_per_sec'] > 0

    def test_onnx_export(self, model, tmp_path):
        onnxruntime, = needs('onnxruntime')
        path = tmp_path / 'lm_resnet20.onnx'
        run_script('onnx_export.py', path, '--model', SHIPPED.name, '--check-forward', cwd=tmp_path)
        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        x = torch.randn(5, 3, 32, 32)
        logits, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-4)
