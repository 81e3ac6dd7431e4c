import { copyFileSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, it } from 'vitest'
import { check, open } from '../../dist/index.mjs'
import { asQemuImg, CLI, describeWithQemu, execute, workspace } from './run.js'

const folder = workspace()

/** An image of 64 KiB clusters with data in its first four, damaged as `damage` says. */
async function damaged(name: string, damage: (image: Layout) => void): Promise<string> {
  const path = join(folder, name)
  await execute('qemu-img', ['create', '-q', '-f', 'qcow2', path, '64M'], folder)
  await execute('qemu-io', ['-c', 'write -P 7 0 256k', path], folder)
  // Room for clusters that nothing uses.
  const bytes = Buffer.concat([readFileSync(path), Buffer.alloc(4 << 16)])
  const refcountTable = Number(bytes.readBigUInt64BE(48))
  const l1 = Number(bytes.readBigUInt64BE(40))
  const l2 = Number(bytes.readBigUInt64BE(l1) & ~(1n << 63n))
  const refcounts = Number(bytes.readBigUInt64BE(refcountTable))
  damage({ bytes, refcountTable, l1, l2, refcounts })
  writeFileSync(path, bytes)
  return path
}

interface Layout {
  readonly bytes: Buffer
  readonly refcountTable: number
  readonly l1: number
  readonly l2: number
  readonly refcounts: number
}

const damages: Readonly<Record<string, (image: Layout) => void>> = {
  nothing: () => {},
  leak: ({ bytes, refcounts }) => bytes.writeUInt16BE(1, refcounts + 2 * 10),
  'high-refcount': ({ bytes, refcounts }) => bytes.writeUInt16BE(9, refcounts + 2 * 5),
  'no-refcount': ({ bytes, refcounts }) => bytes.writeUInt16BE(0, refcounts + 2 * 5),
  shared: ({ bytes, l2 }) => bytes.copy(bytes, l2 + 8, l2, l2 + 8),
  'no-flag': ({ bytes, l1 }) => bytes.writeUInt8(0, l1),
  'no-block': ({ bytes, refcountTable }) => bytes.fill(0, refcountTable, refcountTable + 8),
  unaligned: ({ bytes, l2 }) => bytes.writeUInt8(2, l2 + 6),
  dirty: ({ bytes }) => bytes.writeUInt8(1, 79),
}

describeWithQemu('check -r side by side with qemu-img', () => {
  for (const [name, damage] of Object.entries(damages)) {
    for (const what of ['leaks', 'all']) {
      for (const output of ['human', 'json']) {
        it.concurrent(`${name}: -r ${what} --output=${output}`, async () => {
          const path = await damaged(`${name}-${what}-${output}`, damage)
          const [ours, theirs] = [`${path}.ours`, `${path}.theirs`]
          for (const copy of [ours, theirs]) copyFileSync(path, copy)
          const args = ['check', '-r', what, `--output=${output}`]
          const mine = await asQemuImg([...args, ours], folder)
          const other = await execute('qemu-img', [...args, theirs], folder)
          if (other.stdout === '') {
            // QEMU gives up, in the words of its system; nothing may have been changed.
            expect(mine.code).toBe(other.code)
            expect(readFileSync(ours).equals(readFileSync(path))).toBe(true)
            return
          }
          // New refcount structures lie where each tool finds room for them.
          const comparable = (text: string) =>
            text.replace(/(image-end-offset": |end offset: )\d+/, '$1N').replaceAll(`${theirs}`, ours)
          expect(comparable(mine.stdout)).toBe(comparable(other.stdout))
          expect({ code: mine.code, stderr: mine.stderr }).toEqual({ code: other.code, stderr: other.stderr })
          const verdict = await execute('qemu-img', ['check', ours], folder)
          expect(verdict.code).toBe(other.code)
          expect(readFileSync(ours).readUInt8(79)).toBe(readFileSync(theirs).readUInt8(79))
        })
      }
    }
  }

  it('tells what was repaired and what is left', async () => {
    const path = await damaged('api', image => {
      damages['shared']?.(image)
      damages['leak']?.(image)
    })
    const before = await check(path)
    expect(before).toMatchObject({ ok: false, corruptions: 1, leaks: 2, corruptionsFixed: 0, leaksFixed: 0 })
    const after = await check(path, { repair: 'all' })
    expect(after).toMatchObject({ ok: true, corruptions: 0, leaks: 0, leaksFixed: 2 })
    expect(after.findings.filter(({ repaired }) => repaired).map(({ code }) => code)).toContain('REFCOUNT_TOO_LOW')
    expect(after.corruptionsFixed).toBeGreaterThan(0)
    expect(await check(path)).toMatchObject({ ok: true, corruptionsFixed: 0 })
  })

  it('repairs an image that counts more snapshots than an image may have', async () => {
    const path = await damaged('snapshots', () => {})
    await execute('qemu-img', ['snapshot', '-c', 'one', path], folder)
    const bytes = readFileSync(path)
    bytes.writeUInt32BE(70_000, 60)
    writeFileSync(path, bytes)
    const found = await asQemuImg(['check', path], folder)
    expect(found).toMatchObject({ code: 1, stdout: '', stderr: expect.stringContaining('snapshot table too large') })
    // For reading only: the disk does not depend on its snapshots.
    await expect(open(path, { flags: 'r+' })).rejects.toMatchObject({ code: 'ERR_QCOW2_CORRUPT' })
    {
      await using image = await open(path)
      expect((await image.info()).damaged).toMatchObject([{ code: 'ERR_QCOW2_LIMIT' }])
    }
    const repaired = await asQemuImg(['check', '-r', 'all', path], folder)
    expect(repaired).toMatchObject({ code: 0, stdout: expect.stringMatching(/ 7\d{4} corruptions/) })
    const list = await execute('qemu-img', ['snapshot', '-l', path], folder)
    expect(list.stdout).toMatch(/^1 +one /m)
  })

  it('is refused while somebody else has the image open', async () => {
    const path = await damaged('busy', () => {})
    const image = await open(path)
    await expect(check(path, { repair: 'leaks' })).rejects.toMatchObject({ code: 'ERR_QCOW2_LOCKED' })
    await image.close()
    await expect(check(path, { repair: 'leaks' })).resolves.toMatchObject({ ok: true })
  })

  it('that finds no space says what failed, and can be run again', async () => {
    const path = await damaged('no-space', damages['no-block'] ?? (() => {}))
    // No byte behind the first KiB of a file can be written.
    const full = (...args: string[]) =>
      execute('bash', ['-c', `trap '' XFSZ; ulimit -f 1; exec "$0" "$@"`, process.execPath, CLI, ...args], folder)
    const all = ['-r', 'all', path]
    const { code, stderr } = await full('check', ...all)
    expect(code).toBe(1)
    expect(stderr).toMatch(/qcow2: Check failed: File too large$/m)
    expect(await execute('qemu-img', ['check', path], folder)).toMatchObject({ code: 2 })
    expect(await execute(process.execPath, [CLI, 'check', ...all], folder)).toMatchObject({ code: 0 })
    expect(await execute('qemu-io', ['-c', 'read -P 7 0 256k', path], folder)).toMatchObject({ code: 0 })

    await execute('qemu-io', ['-c', 'discard 0 64k', path], folder)
    expect(await full('compact', '--rewrite', path)).toMatchObject({
      code: 1,
      stderr: expect.stringMatching(/^qcow2: Compaction failed: .*File too large/),
    })
  })

  it('refuses repairs it does not know', async () => {
    const path = await damaged('unknown', () => {})
    await expect(check(path, { repair: 'some' as 'all' })).rejects.toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT' })
  })
})
