import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync } from 'node:fs'
import { expect, it } from 'vitest'
import { makeImages } from './images.js'
import { asQemuImg, describeWithQemu, execute, haveQemu, workspace } from './run.js'

const folder = workspace()
const images = haveQemu ? makeImages(folder) : []

/** What both tools print and return for the same arguments, in the same folder. */
async function both(args: readonly string[]) {
  return { ours: await asQemuImg(args, folder), theirs: await execute('qemu-img', args, folder) }
}

describeWithQemu('side by side with qemu-img', () => {
  const reading: readonly (readonly string[])[] = [
    ['info'],
    ['info', '--output=json'],
    ['info', '--backing-chain'],
    ['info', '--backing-chain', '--output', 'json'],
    ['map', '--output=json'],
    ['map', '--output=json', '--start-offset=1M', '--max-length', '63M'],
    ['map'],
    ['check'],
    ['check', '--output=json'],
    ['measure', '-O', 'qcow2'],
    ['measure', '-O', 'qcow2', '--output=json'],
    ['measure', '-O', 'raw'],
    ['measure', '-O', 'qcow2', '-o', 'cluster_size=4k,refcount_bits=64'],
  ]
  for (const image of images) {
    for (const args of reading) {
      it.concurrent(`${args.join(' ')} ${image}`, async () => {
        const { ours, theirs } = await both([...args, image])
        // What a check finds is worded by each tool; how much of it, and the verdict, is not.
        if (args[0] === 'check') expect({ ...ours, stderr: '' }).toEqual({ ...theirs, stderr: '' })
        else expect(ours).toEqual(theirs)
      })
    }
  }

  it.concurrent.each([
    ['-f', 'qcow2', 'new.qcow2', '64M'],
    ['-f', 'qcow2', '-o', 'cluster_size=4k,lazy_refcounts=on', '-o', 'cluster_size=8k', 'new.qcow2', '1.5G'],
    ['-f', 'qcow2', '-o', 'compat=v3,extended_l2=on,compression_type=zstd,size=1000', 'new.qcow2'],
    ['-f', 'qcow2', '-o', 'compat=0.10,refcount_bits=16', 'new.qcow2', '100'],
    ['-f', 'qcow2', '-b', 'data.qcow2', '-F', 'qcow2', 'new.qcow2'],
    ['-f', 'qcow2', '-o', 'backing_file=data.qcow2,backing_fmt=qcow2', 'new.qcow2', '10M'],
    ['-f', 'qcow2', '-u', '-b', 'no,thing', '-F', 'raw', 'new.qcow2', '10M'],
    ['-f', 'qcow2', '-o', 'preallocation=metadata', 'new.qcow2', '8M'],
    ['-f', 'raw', 'new.raw', '1.5M'],
    ['new.raw', '1000'],
    ['-q', '-f', 'qcow2', 'new.qcow2', '64M'],
  ])('create %s %s %s %s %s %s', async (...words) => {
    const args = words.filter((word): word is string => typeof word === 'string')
    const [mine, other] = [mkdtempSync(`${folder}/a-`), mkdtempSync(`${folder}/b-`)]
    for (const each of [mine, other]) await execute('cp', ['data.qcow2', each], folder)
    const ours = await asQemuImg(['create', ...args], folder, mine)
    const theirs = await execute('qemu-img', ['create', ...args], other)
    expect(ours).toEqual(theirs)
    const file = args.find(word => word.startsWith('new.')) ?? ''
    const infos = [mine, other].map(each => execute('qemu-img', ['info', '--output=json', file], each))
    const [a, b] = (await Promise.all(infos)).map(({ stdout }) => JSON.parse(stdout))
    for (const info of [a, b]) {
      delete info['actual-size']
      delete info.children
    }
    expect(a).toEqual(b)
    if (file.endsWith('.qcow2') && !args.includes('-u')) {
      expect(await execute('qemu-img', ['check', file], mine)).toMatchObject({ code: 0 })
    }
  })

  // One after another: those that fail to create a file fail at the same name.
  it.each([
    [['compare', 'data.qcow2', 'compressed.qcow2']],
    [['compare', 'data.qcow2', 'zstd.qcow2']],
    [['compare', 'data.qcow2', 'v2.qcow2']],
    [['compare', 'data.qcow2', 'empty.qcow2']],
    [['compare', 'empty.qcow2', 'large-clusters.qcow2']],
    [['compare', 'empty.qcow2', 'bitmaps.qcow2']],
    [['compare', 'sparse.raw', 'empty.qcow2']],
    [['compare', '-s', 'sparse.raw', 'empty.qcow2']],
    [['compare', '-s', 'data.qcow2', 'data.qcow2']],
    [['compare', '-q', 'data.qcow2', 'empty.qcow2']],
    [['compare', 'sub/overlay.qcow2', 'sub/deep/top.qcow2']],
    [['measure', '--size=1G', '-O', 'qcow2']],
    [['measure', '--size=2.5T', '-O', 'qcow2', '--output=json']],
    [['measure', '--size=1G', '-O', 'qcow2', '-o', 'preallocation=falloc,cluster_size=2M']],
    [['measure', '-l', 'first', '-O', 'qcow2', 'snapshots.qcow2']],
    [['measure', '-l', 'snapshot.id=2', '-O', 'raw', 'snapshots.qcow2']],
    [['create', '-f', 'raw', '-o', 'help']],
    [['check', 'sparse.raw']],
    [['info', 'nothing-here.qcow2']],
    [['check', 'nothing-here.qcow2']],
    [['map', 'nothing-here.qcow2']],
    [['compare', 'nothing-here.qcow2', 'empty.qcow2']],
    [['create', '-f', 'qcow2', 'new.qcow2']],
    [['create', '-f', 'foo', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', '-o', 'foo=bar', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', '-o', 'size=1M', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', '-b', 'data.qcow2', 'new.qcow2']],
    [['create', '-f', 'qcow2', '-b', 'nothing-here', '-F', 'qcow2', 'new.qcow2']],
    [['create', '-f', 'qcow2', '-b', 'nothing-here', 'new.qcow2']],
    [['create', '-f', 'qcow2', '-u', '-b', 'data.qcow2', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', '-b', '', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', '-o', 'refcount_bits=-1', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', '-o', 'cluster_size=512', 'new.qcow2', '1T']],
    [['create', '-f', 'qcow2', '-F', 'qcow2', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', 'new-dir/new.qcow2', '1M']],
    [['create', '-f', 'raw', 'sub', '1M']],
    [['create', '-f', 'qcow2', '-b', 'x', '-F', 'qcow2', 'x', '1M']],
    [['create', '-f', 'qcow2', '-o', 'compat=0.42', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', '-o', 'cluster_size=1234', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', '-o', 'refcount_bits=7', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', '-o', 'compat=0.10,lazy_refcounts=on', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', '-o', 'compat=0.10,refcount_bits=8', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', '-o', 'data_file_raw=on', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', '-o', 'compat=0.10,data_file=new.raw', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', '-o', 'compat=0.10,compression_type=zstd', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', '-o', 'compat=0.10,extended_l2=on', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', '-o', 'cluster_size=8k,extended_l2=on', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', '-o', 'preallocation=full', '-b', 'data.qcow2', '-F', 'qcow2', 'new.qcow2']],
    [['create', '-f', 'qcow2', '-o', 'preallocation=1234', 'new.qcow2', '1M']],
    [['create', '-f', 'qcow2', '-o', 'compression_type=lz4', 'new.qcow2', '1M']],
    [['create', '-f', 'raw', '-b', 'data.qcow2', 'new.raw', '1M']],
    [['convert', 'data.qcow2']],
    [['convert', '-c', '-C', 'data.qcow2', 'new.raw']],
    [['convert', '-S', '4k', '-C', 'data.qcow2', 'new.raw']],
    [['convert', '-n', '-o', 'compat=v3', 'data.qcow2', 'new.raw']],
    [['convert', '--target-is-zero', 'data.qcow2', 'new.raw']],
    [['convert', '-c', '-O', 'raw', 'data.qcow2', 'new.raw']],
    [['convert', '-c', '-O', 'qcow2', '-o', 'preallocation=full', 'data.qcow2', 'new.qcow2']],
    [['convert', '-O', 'qcow2', '-o', 'backing_file=empty.qcow2', 'data.qcow2', 'new.qcow2']],
    [['convert', 'nothing-here.qcow2', 'new.raw']],
    [['measure', '-l', 'nothing', 'snapshots.qcow2']],
    [['measure']],
    [['measure', '--size=1', 'data.qcow2']],
    [['measure', '-f', 'raw', '--size=1']],
  ])('%j', async args => {
    const { ours, theirs } = await both(args)
    expect(ours).toEqual(theirs)
  })
})

describeWithQemu('an image that QEMU has open for writing', () => {
  it('is not read, except with -U', async () => {
    await execute('cp', ['data.qcow2', 'busy.qcow2'], folder)
    const writer = spawn('qemu-io', ['-f', 'qcow2', 'busy.qcow2'], { cwd: folder, stdio: ['pipe', 'pipe', 'ignore'] })
    try {
      writer.stdin.write('write 0 64k\n')
      await once(writer.stdout, 'data')
      for (const args of [
        ['info'],
        ['map'],
        ['check'],
        ['measure'],
        ['compare', 'empty.qcow2'],
        ['convert', '-O', 'raw'],
      ]) {
        const rest = args[0] === 'convert' ? ['busy.qcow2', 'busy.raw'] : ['busy.qcow2']
        const { ours, theirs } = await both([...args, ...rest])
        expect(ours, args[0]).toEqual(theirs)
        const shared = await both([...args, '-U', ...rest])
        expect({ ...shared.ours, stderr: '' }, `${args[0]} -U`).toEqual({ ...shared.theirs, stderr: '' })
      }
    } finally {
      writer.stdin.end()
      await once(writer, 'exit')
    }
  })
})
