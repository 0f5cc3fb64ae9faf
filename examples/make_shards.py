"""Write a folder of images as WebDataset shards, for `dino_train --data 'SHARDS/{000..099}.tar'`.

    python examples/make_shards.py FOLDER SHARDS [IMAGES_PER_SHARD]

The images are shuffled and copied as they are; class folders become labels."""
import sys
from pathlib import Path

from webdataset import ShardWriter

from dino_nb.data import open_images
from dino_nb.shards import epoch_order


def main(folder, shards, per_shard=1000):
    source, shards = open_images(folder), Path(shards)
    shards.mkdir(parents=True)     # an existing folder is not written into
    with ShardWriter(str(shards/'%06d.tar'), maxcount=int(per_shard), verbose=0) as writer:
        for number, i in enumerate(epoch_order(source, seed=0, epoch=0).tolist()):
            file = Path(folder)/source.name(i)
            label = {} if source.labels is None else dict(cls=int(source.labels[i]))
            writer.write({'__key__': f'{number:09}', file.suffix[1:].lower(): file.read_bytes(),
                          **label})
    last = max(path.stem for path in shards.glob('*.tar'))
    print(f"{len(source):,} images; train with --data '{shards}/{{000000..{last}}}.tar'")


if __name__ == '__main__': main(*sys.argv[1:])
