/** Images that are described in place of named, by `json:` and by options: as qemu-img takes them. */

import { createHash } from 'node:crypto'
import { cpSync, readFileSync, rmSync } from 'node:fs'
import { basename, join } from 'node:path'
import { expect, it } from 'vitest'
import { asQemuImg, describeWithQemu, execute, haveQemu, workspace } from './run.js'

const folder = workspace()

if (haveQemu) {
  for (const args of [
    'create -q -f qcow2 base.qcow2 4M',
    'create -q -f qcow2 -b base.qcow2 -F qcow2 a.qcow2',
    'create -q -f raw r.raw 4M',
    'bitmap --add base.qcow2 b0',
  ]) {
    expect(await execute('qemu-img', args.split(' '), folder), args).toMatchObject({ code: 0 })
  }
  await execute('qemu-io', ['-f', 'qcow2', '-c', 'write -P 7 64k 1M', 'a.qcow2'], folder)
}

/** Each tool in a folder of its own: what it says, and what is left of the images. */
async function both(args: readonly string[]) {
  const results: { outcome: unknown; files: readonly string[] }[] = []
  for (const side of ['ours', 'theirs'] as const) {
    const beside = join(folder, '..', `${basename(folder)}-${side}`)
    cpSync(folder, beside, { recursive: true })
    const outcome = await (side === 'ours' ? asQemuImg(args, folder, beside) : execute('qemu-img', args, beside))
    const files = ['a.qcow2', 'base.qcow2', 'r.raw'].map(name =>
      createHash('sha256')
        .update(readFileSync(join(beside, name)))
        .digest('hex'),
    )
    results.push({ outcome, files })
    rmSync(beside, { recursive: true })
  }
  const [ours, theirs] = results
  return { ours, theirs }
}

const QCOW2 = 'driver=qcow2,file.filename=a.qcow2'
const RAW = 'driver=raw,file.filename=r.raw'

const SAME = `
info --image-opts ${QCOW2},read-only=on,file.driver=file,file.read-only=off
info --image-opts ${QCOW2},cache.direct=on,cache.no-flush=off,node-name=x,discard=unmap,detect-zeroes=on,lazy-refcounts=on
info --image-opts ${QCOW2},overlap-check=all,cache-size=1M,l2-cache-entry-size=4k,cache-clean-interval=5
info --image-opts file.filename=a.qcow2
info json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}
info json:{'driver':'qcow2','file.filename':'a.qcow2'}
info -f raw json:{"driver":"qcow2","file.filename":"r.raw"}
info json:[]
info json:{"driver":"qcow2"}
info json:{"driver":"foo","file.filename":"a.qcow2"}
info json:{"driver":"qcow2","file.filename":"a.qcow2","bla":1}
info json:{"driver":"qcow2","file":{"filename":"a.qcow2","bla":{"x":1}}}
info --image-opts ${QCOW2},read-only=maybe
info --image-opts ${QCOW2},overlap-check=blubb
info --image-opts filename=a.qcow2
info --image-opts a.qcow2
map --image-opts driver=qcow2,file.filename=gone
map --image-opts driver=file,filename=r.raw
check --image-opts ${QCOW2}
check -r all --image-opts ${QCOW2},read-only=on
compare --image-opts driver=raw,file.filename=a.qcow2 ${QCOW2}
compare json:{"driver":"raw","file":{"filename":"r.raw"}} a.qcow2
measure -O qcow2 json:{"driver":"raw","file":{"filename":"r.raw"}}
convert --image-opts driver=qcow2,file.filename=gone out
convert -O raw a.qcow2 --target-image-opts ${RAW}
convert -n --target-image-opts a.qcow2 driver=raw,file.filename=gone
convert -n --target-image-opts -O raw a.qcow2 ${RAW}
convert -n --target-image-opts a.qcow2 ${RAW}
convert -n -O raw a.qcow2 json:{"driver":"raw","file.filename":"r.raw"}
dd --image-opts if=${QCOW2} of=r.raw bs=512
dd if=json:{"driver":"qcow2","file.filename":"a.qcow2"} of=r.raw bs=512
resize -f qcow2 --image-opts ${QCOW2} +1M
resize --image-opts ${QCOW2},read-only=on +1M
resize --image-opts ${QCOW2} +1M
snapshot -c x --image-opts ${QCOW2},read-only=on
snapshot -l --image-opts ${QCOW2},read-only=on
amend -o compat=v2 --image-opts ${QCOW2},read-only=on
bitmap --remove json:{"driver":"qcow2","file":{"filename":"base.qcow2"}} b0
rebase -u -F raw -b r.raw json:{"driver":"qcow2","file":{"filename":"a.qcow2"}}`

describeWithQemu('descriptions beside qemu-img', () => {
  it.each(SAME.trim().split('\n'))('%s', async line => {
    const { ours, theirs } = await both(line.split(' '))
    expect(ours?.outcome).toEqual(theirs?.outcome)
    if (!/^(snapshot|bitmap|rebase)/.test(line)) expect(ours?.files).toEqual(theirs?.files)
  })

  it('are not followed where an image holds them', async () => {
    const name = 'json:{"driver":"raw","file.filename":"r.raw"}'
    await execute(
      'qemu-img',
      ['create', '-q', '-f', 'qcow2', '-u', '-b', name, '-F', 'raw', 'evil.qcow2', '1M'],
      folder,
    )
    const { code, stderr } = await asQemuImg(['convert', '-O', 'raw', 'evil.qcow2', 'out'], folder)
    expect([code, stderr]).toEqual([1, expect.stringContaining('JSON description')])
  })
})
