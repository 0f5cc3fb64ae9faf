"""Images per second and core from a JPEG of 500 x 375 to 2 x 224 and 8 x 96 views: the published
way (PIL, one transform per view) and ours; then images in memory, batched and one by one; then
photographs of 12 megapixels, decoded whole and no larger than their crops need.

    python benchmarks/input.py --images FOLDER --write
"""
import argparse
import random
import tempfile
from functools import partial
from pathlib import Path

import common
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as T

from dino_nb.augment import ViewSettings, crop_views, crop_views_batched, sample_views
from dino_nb.data import open_images
from dino_nb.decode import decode_image
from dino_nb.features import eval_views
from dino_nb.photometric import photometric_views
from dino_nb.views import MultiCrop, ViewBatch, collate_views, to_views

SIZE, CPU = (500, 375), torch.device('cpu')
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# The published way ---------------------------------------------------------------------------

def maybe(probability, change):
    "Return a transform that applies a change of a PIL image with some probability."
    return T.Lambda(lambda image: change(image) if random.random() < probability else image)

def blur(image): return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.)))

def solarize(image): return ImageOps.solarize(image)

def published_view(size, scale, blur_prob, solarize_prob):
    "Return the transform of one view."
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    return T.Compose([
        T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
        T.RandomHorizontalFlip(0.5), jitter, T.RandomGrayscale(0.2), maybe(blur_prob, blur),
        maybe(solarize_prob, solarize), T.ToTensor(), T.Normalize(MEAN, STD)])

def published_transforms(large=224, small=96):
    "Return the transforms of two global and eight local views."
    views = [published_view(large, (0.4, 1.), *probs) for probs in ((1., 0.), (0.1, 0.2))]
    return views + 8 * [published_view(small, (0.05, 0.4), 0.5, 0.)]

def decode(path):
    with open(path, 'rb') as file: return Image.open(file).convert('RGB')


# The images ----------------------------------------------------------------------------------

def photographs(folder):
    "Return the paths of all images of the right size below a folder."
    return [path for path in sorted(Path(folder).glob('*')) if Image.open(path).size == SIZE]

def synthesised(folder, n=16, size=SIZE, grain=0.08):
    "Write n JPEGs of clouds with grain, whose size in bytes is that of photographs."
    generator, paths = torch.Generator().manual_seed(0), []
    for i in range(n):
        layers = [torch.nn.functional.interpolate(
            torch.rand(1, 3, s, s, generator=generator), size[::-1], mode='bicubic')[0] / s ** 0.5
                  for s in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if s < min(size) / 2]
        image = sum(layers) + grain * torch.randn(1, *size[::-1], generator=generator)
        image = (image - image.min()) / (image.max() - image.min())
        paths.append(Path(folder) / f'{i}.jpg')
        T.ToPILImage()(image).save(paths[-1], quality=92)
    return paths


# The ladders ---------------------------------------------------------------------------------

def file_ladder(paths):
    "Yield (rung, work, baseline) for images in files."
    settings, transforms = ViewSettings(), published_transforms()
    def published():
        for path in paths:
            image = decode(path)
            [transform(image) for transform in transforms]
    def crop(i, path):
        image = decode_image(path)
        params = sample_views(settings, 0, 0, [i], [image.shape[1:]])
        return ViewBatch(crop_views(image, params.rows(0), settings), params, torch.tensor([i]), [])
    def ours():
        for start in range(0, len(paths), 8):
            batch = [crop(i, path) for i, path in enumerate(paths[start:start + 8], start)]
            to_views(collate_views(batch), CPU)
    yield 'decode alone', lambda: [decode(path) for path in paths], published
    yield 'published: decode, ten views', published, published
    yield 'ours: decode alone', lambda: [decode_image(path) for path in paths], published
    yield ('ours: decode, crop, resize', lambda: [crop(*pair) for pair in enumerate(paths)],
           published)
    yield 'ours: decode, ten views with color', ours, published


def memory_ladder(size, batch=64):
    "Yield (rung, work, baseline) for images in memory."
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    settings = ViewSettings(global_size=size, local_size=size // 2)
    pictures, sizes = [T.ToPILImage()(image) for image in images], [(size, size)] * batch
    transforms = published_transforms(size, size // 2)
    def published(): return [transform(p) for p in pictures for transform in transforms]
    def batched():
        params = sample_views(settings, 0, 0, range(batch), sizes)
        photometric_views(crop_views_batched(images, params, settings), params)
    def one_by_one():
        samples = []
        for i, image in enumerate(images):
            params = sample_views(settings, 0, 0, [i], [(size, size)])
            samples.append(ViewBatch(crop_views(image, params.rows(0), settings), params,
                                     torch.tensor([i]), []))
        to_views(collate_views(samples), CPU)
    yield f'{size} px in memory, published', published, published
    yield f'{size} px in memory, batched', batched, published
    yield f'{size} px in memory, one by one', one_by_one, published


def large_ladder(folder):
    "Yield (rung, work, baseline) for photographs of 12 megapixels in a folder."
    crops = {how: MultiCrop(open_images(folder).set_decoding(decode=how), ViewSettings())
             for how in ('exact', 'fast')}
    def crop(how): return [crops[how][0, i] for i in range(len(crops[how]))]
    def color(how): return [to_views(batch, CPU) for batch in crop(how)]
    for name, work in (('decode, crop, resize', crop), ('decode, ten views with color', color)):
        for how in ('exact', 'fast'):
            yield f'12 megapixels, {how}: {name}', partial(work, how), partial(work, 'exact')

def differences(folder):
    "Print by how many of 255 gray levels fast decoding changes crops and evaluation views."
    exact, fast = (open_images(folder).set_decoding(decode=how) for how in ('exact', 'fast'))
    def levels(name, a, b):
        off = (a.float() - b.float()).abs()
        print(f'{name}: mean {off.mean():.2f}, largest {off.max():.0f} of 255 gray levels')
    crops = [zip(*(MultiCrop(source, ViewSettings())[0, i].crops for i in range(len(source))))
             for source in (exact, fast)]
    for name, a, b in zip(('global crops', 'local crops'), *crops):
        levels(name, torch.cat(a), torch.cat(b))
    whole, small = ([source.read(i, lambda h, w: 8)[0] for i in range(len(source))]
                    for source in (exact, fast))
    scale = 255 * torch.tensor(STD)[:, None, None]
    levels('evaluation views', eval_views(whole, 224) * scale, eval_views(small, 224) * scale)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--images', default='', help='folder of JPEGs; those of 500 x 375 are used')
    parser.add_argument('--only', default='', help='only the rungs whose name holds this')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--wait', type=float, default=5, help='minutes to wait for a quiet machine')
    parser.add_argument('--write', action='store_true', help='append to results/input.csv')
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = photographs(args.images) if args.images else synthesised(folder)
        kind = 'photographs' if args.images else 'synthesised'
        mean = sum(path.stat().st_size for path in paths) / len(paths)
        print(f'{len(paths)} {kind} of 500 x 375, {mean / 1e3:.0f} kB each, one thread')
        rungs = [(*rung, len(paths)) for rung in file_ladder(paths)]
        rungs += [(*rung, 64) for size in (32, 48) for rung in memory_ladder(size)]
        (large := Path(folder) / 'large').mkdir()
        synthesised(large, n=4, size=(4000, 3000), grain=0.02)
        differences(large)
        rungs += [(*rung, 4) for rung in large_ladder(large)]
        rungs = [rung for rung in rungs if args.only in rung[0]]
        rows, load = [], common.wait_until_quiet(minutes=args.wait)
        for name, work, baseline, n_images in rungs:
            times = common.compare(work, baseline, CPU, args.repeats)
            rows.append(dict(rung=name, images=('noise' if 'px' in name else
                                     'synthesised' if 'megapixels' in name else kind),
                             images_per_second=n_images / times['seconds'],
                             images_per_cpu_second=n_images / times['cpu_seconds']) | times
                        | dict(load_before=load))
    common.print_table(rows, ['rung', 'images_per_second', 'images_per_cpu_second', 'ratio',
                              'best_ratio', 'cpu_ratio', 'load_before'])
    if args.write: common.write_rows('input', rows, common.machine(CPU))


if __name__ == '__main__': main()
