/** Images of every kind, made by QEMU. */

import { execFileSync } from 'node:child_process'
import { closeSync, mkdirSync, openSync, truncateSync, writeSync } from 'node:fs'
import { join } from 'node:path'

/** One image: how to make it, in a folder of its own kind. */
interface Recipe {
  readonly name: string
  make(tool: Tools): void
}

interface Tools {
  create(args: string): void
  /** qemu-io commands on an image. */
  io(image: string, ...commands: string[]): void
  img(args: string): void
  poke(image: string, offset: number, bytes: readonly number[]): void
  truncate(image: string, size: number): void
}

/** The names of the images in `folder`, all made. */
export function makeImages(folder: string): string[] {
  mkdirSync(join(folder, 'sub/deep'), { recursive: true })
  const run = (file: string, args: readonly string[]) => execFileSync(file, args, { cwd: folder, stdio: 'pipe' })
  const tools: Tools = {
    create: args => run('qemu-img', ['create', '-q', '-f', 'qcow2', ...args.split(' ')]),
    img: args => run('qemu-img', args.split(' ')),
    io: (image, ...commands) => run('qemu-io', ['-f', 'qcow2', ...commands.flatMap(each => ['-c', each]), image]),
    poke(image, offset, bytes) {
      const file = openSync(join(folder, image), 'r+')
      writeSync(file, Buffer.from(bytes), 0, bytes.length, offset)
      closeSync(file)
    },
    truncate: (image, size) => {
      closeSync(openSync(join(folder, image), 'a'))
      truncateSync(join(folder, image), size)
    },
  }
  for (const recipe of RECIPES) recipe.make(tools)
  return RECIPES.map(({ name }) => name)
}

const DATA = ['write -P 1 0 1M', 'write -P 2 10M 100k', 'write -z 20M 300k', 'write -P 3 63M 1M']

const RECIPES: readonly Recipe[] = [
  { name: 'empty.qcow2', make: ({ create }) => create('empty.qcow2 64M') },
  {
    name: 'data.qcow2',
    make({ create, io }) {
      create('data.qcow2 64M')
      io('data.qcow2', ...DATA)
    },
  },
  {
    name: 'v2.qcow2',
    make({ create, io }) {
      create('-o compat=0.10 v2.qcow2 64M')
      io('v2.qcow2', ...DATA)
    },
  },
  {
    name: 'small-clusters.qcow2',
    make({ create, io }) {
      create('-o cluster_size=512,refcount_bits=1 small-clusters.qcow2 1M')
      io('small-clusters.qcow2', 'write -P 1 0 70k', 'write -P 2 512k 1k')
    },
  },
  {
    name: 'large-clusters.qcow2',
    make({ create, io }) {
      create('-o cluster_size=2M,refcount_bits=64,lazy_refcounts=on large-clusters.qcow2 1G')
      io('large-clusters.qcow2', 'write -P 1 5M 1M', 'write -P 2 1000M 5M')
    },
  },
  {
    name: 'subclusters.qcow2',
    make({ create, io }) {
      create('-o extended_l2=on,cluster_size=128k subclusters.qcow2 64M')
      io('subclusters.qcow2', 'write -P 1 0 4k', 'write -P 2 20k 8k', 'write -z 40k 4k', 'write -P 3 1M 300k')
    },
  },
  {
    name: 'odd-size.qcow2',
    make({ create, io }) {
      create('odd-size.qcow2 33554944')
      io('odd-size.qcow2', 'write -P 1 33554432 512')
    },
  },
  {
    name: 'compressed.qcow2',
    make({ create, io, img }) {
      create('pattern.qcow2 64M')
      io('pattern.qcow2', ...DATA)
      img('convert -c -O qcow2 pattern.qcow2 compressed.qcow2')
    },
  },
  {
    name: 'zstd.qcow2',
    make: ({ img }) => img('convert -c -O qcow2 -o compression_type=zstd data.qcow2 zstd.qcow2'),
  },
  {
    name: 'snapshots.qcow2',
    make({ create, io, img }) {
      create('snapshots.qcow2 16M')
      io('snapshots.qcow2', 'write -P 1 0 1M')
      img('snapshot -c first snapshots.qcow2')
      io('snapshots.qcow2', 'write -P 2 512k 1M')
      img('snapshot -c a-rather-long-name-for-a-snapshot snapshots.qcow2')
      io('snapshots.qcow2', 'write -P 3 0 64k')
    },
  },
  {
    name: 'bitmaps.qcow2',
    make({ create, img }) {
      create('bitmaps.qcow2 64M')
      img('bitmap --add -g 64k bitmaps.qcow2 nightly')
      img('bitmap --add --disable -g 1M bitmaps.qcow2 weekly')
    },
  },
  {
    name: 'preallocated.qcow2',
    make: ({ create }) => create('-o preallocation=metadata preallocated.qcow2 8M'),
  },
  {
    name: 'data-file.qcow2',
    make({ create, io }) {
      create('-o data_file=data-file.raw,data_file_raw=on data-file.qcow2 8M')
      io('data-file.qcow2', 'write -P 1 1M 1M')
    },
  },
  {
    name: 'sub/overlay.qcow2',
    make({ create, io }) {
      create('-b ../data.qcow2 -F qcow2 sub/overlay.qcow2 80M')
      io('sub/overlay.qcow2', 'write -P 9 512k 1M', 'write -z 63M 512k', 'discard 10M 64k')
    },
  },
  {
    name: 'sub/deep/top.qcow2',
    make({ create, io }) {
      create('-b ../overlay.qcow2 -F qcow2 -o extended_l2=on sub/deep/top.qcow2')
      io('sub/deep/top.qcow2', 'write -P 8 1M 4k', 'write -P 8 70M 64k')
    },
  },
  {
    name: 'on-raw.qcow2',
    make({ create, io, truncate }) {
      truncate('base.raw', 5 << 20)
      create('-b base.raw -F raw on-raw.qcow2 16M')
      io('on-raw.qcow2', 'write -P 7 4M 64k')
    },
  },
  {
    name: 'leaks.qcow2',
    make({ create, io, poke }) {
      create('leaks.qcow2 64M')
      io('leaks.qcow2', 'write -P 1 0 128k')
      // Counts of clusters that nothing refers to: the refcount block of a new image is the third cluster.
      poke('leaks.qcow2', 0x20000 + 2 * 20, [0, 1, 0, 1])
    },
  },
  {
    name: 'corrupt.qcow2',
    make({ create, io, poke }) {
      create('corrupt.qcow2 64M')
      io('corrupt.qcow2', 'write -P 1 0 128k')
      // The data clusters are the sixth and the seventh: their counts become 0.
      poke('corrupt.qcow2', 0x20000 + 2 * 5, [0, 0, 0, 0])
    },
  },
  {
    name: 'sparse.raw',
    make: ({ truncate }) => truncate('sparse.raw', 3 << 20),
  },
  { name: 'empty.raw', make: ({ truncate }) => truncate('empty.raw', 0) },
]
