/** The same commands to qemu-io and to ours, on images of their own: the same lines, the same exit code, the same disk. */

import { symlinkSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { compare, create } from '../../dist/index.mjs'
import { CLI, describeWithQemu, execute, type Outcome, qemuVersion, workspace } from './run.js'

const folder = workspace()
symlinkSync(CLI, join(folder, 'qemu-io'))

/** A case: options and commands; IMG and RAW are the images. */
interface Case {
  readonly about: string
  readonly args?: string
  readonly commands: readonly string[]
  /** Images are made by these options. */
  readonly shape?: Parameters<typeof create>[1]
  readonly raw?: true
}

const QCOW2 = '-f qcow2 IMG'

const CASES: readonly Case[] = [
  {
    about: 'words and flags',
    commands: [
      'read 0 512',
      'read -Z 0 512',
      'read -P',
      'read 0',
      'read',
      'read 0 1 2 3',
      'read 0 512 -q',
      'foo',
      '  ',
    ],
  },
  { about: 'numbers alone, bytes', commands: ['read -C 0 512', 'read -v 508 40', 'r 0 1', 'w 0 1', 'rv 0 1'] },
  {
    about: 'patterns',
    commands: ['read -P 0x100 0 1', 'read -P 1x 0 1', 'read -P 010 0 1', 'read -P -1 0 1', 'read -P 1 -P 0 0 1'],
  },
  {
    about: 'numbers',
    commands: ['read 0 1x', 'read 1.5 2', 'read 1.5k 1.5', 'read -1 2', 'read -- -1 2', 'read 0 8E', 'read 0 4G'],
  },
  {
    about: 'units',
    commands: ['write 0 1.5M', 'write 3M 4608', 'read 0x10 0x20', 'read 1B 1', 'read 1kb 1', 'read 1e3 1', 'read +1 1'],
  },
  {
    about: 'parts that are verified',
    commands: ['read -s 4 0 9', 'read -P 0 -s 5 -l 6 0 10', 'read -P 1 -s 5 -l 5 0 10', 'read -P 1 -s 15 0 10'],
  },
  { about: "the disk's end", commands: ['read 64M 1', 'read 64M 0', 'read 65M 0', 'read 67108863 2', 'write 64M 1'] },
  {
    about: 'flags that exclude each other',
    commands: [
      'write -b -z 0 512',
      'write -f -c 0 64k',
      'write -n 0 1',
      'write -u 0 1',
      'write -z -P 1 0 1',
      'write 0 4G',
    ],
  },
  {
    about: 'compressed clusters',
    commands: [
      'write -c 1 512',
      'write -c 512 512',
      'write -c 0 64k',
      'write -c 1M 128k',
      'read -P 205 1M 128k',
      'map',
    ],
  },
  {
    about: 'zeroes',
    commands: [
      'write -zn 0 512',
      'write 0 1k',
      'write -zn 0 512',
      'write -zn 0 128k',
      'write -zu 1M 64k',
      'write -zr 0 1',
    ],
  },
  {
    about: 'zeroes of version 2',
    shape: { version: 2, size: 2 ** 26 },
    commands: ['write 0 64k', 'write -zn 0 64k', 'write -z 0 64k'],
  },
  { about: 'durable writes', commands: ['write -f 0 1k', 'writev -f 0 1k', 'flush', 'f'] },
  { about: 'a pattern file', commands: ['write -s nothing 0 512'] },
  {
    about: 'reading only',
    args: `-r ${QCOW2}`,
    commands: ['write 0 1', 'discard 0 1', 'writev 0 1', 'aio_write 0 1', 'truncate 1M', 'flush', 'read 0 1'],
  },
  { about: 'no image', args: '', commands: ['read 0 512', 'open', 'close', 'sleep 1', 'length', 'help foo'] },
  { about: 'a second image', commands: ['open IMG', 'close', 'open IMG', 'length'] },
  {
    about: 'allocation',
    commands: ['write 0 64k', 'alloc 0', 'alloc 0 1M', 'alloc 64M', 'alloc 65M 1', 'alloc 0 65M', 'alloc 1 3', 'map'],
  },
  { about: 'the image', commands: ['length', 'info', 'i', 'l', 'write -z 128k 64k', 'map'] },
  {
    about: 'extended L2',
    shape: { extendedL2: true, size: 2 ** 26 },
    commands: ['info', 'write 0 2k', 'map', 'alloc 0 64k'],
  },
  {
    about: 'several buffers',
    commands: [
      'writev 0 512 1k',
      'readv -v 0 16 16',
      'readv 0 4G',
      'readv 0 1G 1G',
      'readv -P 5 0 1',
      'readv 0 x',
      'readv 64M 1',
    ],
  },
  {
    about: 'requests that go on',
    commands: [
      'aio_write -P 3 0 512',
      'aio_flush',
      'aio_read -P 9 0 512',
      'aio_flush',
      'aio_write 64M 512',
      'aio_flush',
      'aio_read 64M 512',
      'aio_flush',
      'aio_read -v 0 20',
    ],
  },
  {
    about: 'flags of requests that go on',
    commands: [
      'aio_read -i 0 1',
      'aio_write -i 0 1',
      'aio_write -z 0 1 1',
      'aio_write -u 0 1',
      'aio_write -zr 0 1',
      'aio_write 0',
    ],
  },
  {
    about: 'discards',
    commands: [
      'write 0 128k',
      'discard 0 64k',
      'discard 64M 1',
      'discard 0 3G',
      'discard -q 0 1',
      'discard x 1',
      'read -P 0 0 64k',
    ],
  },
  {
    about: 'discards that are ignored',
    args: `-d ignore ${QCOW2}`,
    commands: ['write 0 64k', 'discard 0 64k', 'read -P 205 0 64k'],
  },
  {
    about: 'sizes of the disk',
    commands: [
      'truncate 65M',
      'length',
      'truncate 1M',
      'length',
      'truncate 1.5',
      'truncate 1000',
      'truncate -m foo 1M',
    ],
  },
  { about: 'preallocation', commands: ['truncate -m full 65M', 'length', 'alloc 64M 1M', 'truncate', 'truncate -Z 1'] },
  { about: 'signals', commands: ['sleep x', 'sleep 1', 'sigraise x', 'sigraise 99', 'sigraise 9', 'length'] },
  { about: 'the end', commands: ['q', 'foo'] },
  {
    about: 'reopening',
    commands: [
      'reopen',
      'reopen -r',
      'write 0 1',
      'reopen -w',
      'write 0 1',
      'reopen -r -w',
      'reopen x',
      'reopen -o',
      'reopen -c foo',
    ],
  },
  {
    about: 'options of the driver',
    commands: [
      'reopen -o foo=bar',
      'reopen -o driver=raw',
      'reopen -o lazy-refcounts=foo',
      'reopen -o overlap-check=blubb',
      'reopen -o overlap-check=constant,overlap-check.template=all',
      'reopen -o cache-size=1M,l2-cache-size=1M,refcount-cache-size=1M',
      'reopen -o cache-size=1M,l2-cache-size=2M',
      'reopen -o l2-cache-entry-size=33k',
      'reopen -o refcount-cache-size=256T',
      'reopen -o cache-clean-interval=-1',
      'reopen -o read-only=on -r',
      'reopen -o cache.direct=on -c none',
      'reopen -o lazy-refcounts=on,cache-clean-interval=5',
      'write 0 64k',
    ],
  },
  {
    about: 'opening',
    args: '',
    commands: [
      'open -o foo=1 IMG',
      'open -Z IMG',
      'open IMG b',
      'open -t foo IMG',
      'open -d foo IMG',
      'open -r IMG',
      'write 0 1',
    ],
  },
  {
    about: 'an overlay',
    args: '',
    commands: ['open -s IMG', 'write 0 1', 'map', 'close', 'open IMG', 'read -P 0 0 1'],
  },
  { about: 'a description', args: '--image-opts driver=qcow2,file.filename=IMG', commands: ['length'] },
  { about: 'an unknown driver', args: '--image-opts driver=qcow3,file.filename=IMG', commands: ['length'] },
  { about: 'no file', args: 'nothing', commands: ['length'] },
  { about: 'bad modes', args: '-t foo IMG', commands: ['length'] },
  { about: 'sharing for writing', args: '-U IMG', commands: ['length'] },
  {
    about: 'breakpoints and zones',
    commands: ['break write_aio A', 'remove_break A', 'resume A', 'zone_report 0 1', 'zone_append 0 1'],
  },
  {
    about: 'raw',
    raw: true,
    args: '-f raw RAW',
    commands: ['length', 'info', 'map', 'write -c 0 64k', 'truncate 1000', 'length', 'write -z 0 512'],
  },
]

/** Times are what they are; images have names of their own. */
const settled = (text: string): string =>
  text
    .replace(/\d+ ops; .*ops\/sec\)/g, 'ops')
    .replace(/^(\d+,1),\d+:\d\d:\d\d\.\d\d,.*$/gm, '$1')
    .replace(/\b(theirs|ours)-\d+\b/g, 'image')

/** What QEMU prints, but for what it would still print when a signal ends it. */
const shown = ({ code, signal, stdout, stderr }: Outcome) => ({
  code,
  signal,
  stdout: settled(stdout),
  stderr: settled(stderr),
})

// The words are those of this version.
const AS = 10
if (qemuVersion !== 0 && qemuVersion !== AS) {
  process.stderr.write(`SKIPPED (qemu-io is of version ${qemuVersion}, not ${AS}): qemu-io and ours\n`)
}

describeWithQemu('qemu-io and ours', () => {
  test.skipIf(qemuVersion !== AS).each(CASES.map((each, index) => ({ ...each, index })))(
    '$about',
    async ({ args = QCOW2, commands, shape, raw, index }) => {
      const run = async (who: 'theirs' | 'ours') => {
        const name = `${who}-${index}.${raw ? 'raw' : 'qcow2'}`
        const image = await create(join(folder, name), shape ?? { size: 2 ** 26, ...(raw && { format: 'raw' }) })
        await image.close()
        const words = [...commands.flatMap(each => ['-c', each]), ...args.split(' ').filter(Boolean)]
        const own = words.map(word => word.replaceAll(/IMG|RAW/g, name))
        const outcome =
          who === 'ours'
            ? await execute(process.execPath, [join(folder, 'qemu-io'), ...own], folder)
            : await execute('qemu-io', own, folder)
        return { name, outcome }
      }
      const [theirs, ours] = await Promise.all([run('theirs'), run('ours')])
      expect(shown(ours.outcome)).toEqual(shown(theirs.outcome))
      const format = raw ? 'raw' : 'qcow2'
      const [a, b] = [theirs, ours].map(({ name }) => join(folder, name)) as [string, string]
      expect(await compare(a, b, { formatA: format, formatB: format })).toMatchObject({ identical: true })
    },
  )
})
