/** `snapshot`, `bitmap` and `resize`: what qemu-img prints and does, done by us, and the other way round. */

import { copyFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { expect, it } from 'vitest'
import { describeWithQemu, ok, qcow2, qemuImg, qemuIo, temporaryFolder } from '../interop/qemu.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)

function image(name: string): string {
  ok(qcow2('create', '-q', '-f', 'qcow2', at(name), '8M'))
  return at(name)
}

const clean = (path: string): void => {
  ok(qemuImg('check', path))
}

describeWithQemu('snapshot', () => {
  it('creates, lists as qemu-img does, applies and deletes', () => {
    const path = image('life.qcow2')
    expect(ok(qcow2('snapshot', '-l', path))).toBe('')
    ok(qcow2('snapshot', '-c', 'one', path))
    ok(qemuImg('snapshot', '-c', 'two', path))
    ok(qcow2('snapshot', '-c', 'three', path))
    expect(ok(qcow2('snapshot', path))).toBe(ok(qemuImg('snapshot', '-l', path)))
    ok(qcow2('snapshot', '-a', 'two', path))
    ok(qcow2('snapshot', '-d', 'two', path))
    ok(qemuImg('snapshot', '-d', 'one', path))
    clean(path)
    expect(ok(qcow2('snapshot', '-l', path))).toMatch(/^Snapshot list:\n.*\n3 +three/)
  })

  it.each([
    [['-d', 'none'], "Could not delete snapshot 'none': snapshot not found"],
    [['-a', 'none'], "Could not apply snapshot 'none': "],
    [['-a', 'one', '-c', 'two'], "Cannot mix '-l', '-a', '-c', '-d'"],
    [['-c', 'one', '-c', 'two'], "Cannot mix '-l', '-a', '-c', '-d'"],
    [['-l', '-l'], "Cannot mix '-l', '-a', '-c', '-d'"],
    [['-U', '-c', 'one'], 'force-share=on can only be used with read-only images'],
  ])('refuses %j', (args, message) => {
    const path = image('refused.qcow2')
    const { code, stderr } = qcow2('snapshot', ...args, path)
    expect(code).toBe(1)
    expect(stderr).toContain(message)
    expect(ok(qemuImg('snapshot', '-l', path))).toBe('')
    clean(path)
  })
})

describeWithQemu('an overlay, and an image with an external data file', () => {
  it.each([
    ['overlay.qcow2', ['-b', at('base.qcow2'), '-F', 'qcow2']],
    ['divided.qcow2', ['-o', `data_file=${at('divided.data')}`]],
  ])('%s gets snapshots and bitmaps', (name, options) => {
    image('base.qcow2')
    const path = at(name)
    ok(qemuImg('create', '-q', '-f', 'qcow2', ...options, path, ...(name === 'overlay.qcow2' ? [] : ['8M'])))
    if (name === 'overlay.qcow2') {
      ok(qcow2('snapshot', '-c', 'one', path))
      ok(qemuIo('-f', 'qcow2', '-c', 'write -P 3 0 128k', path))
      ok(qcow2('snapshot', '-a', 'one', path))
      ok(qcow2('snapshot', '-d', 'one', path))
    }
    ok(qcow2('bitmap', '--add', path, 'b'))
    copyFileSync(path, at('source.qcow2'))
    ok(qcow2('bitmap', '--merge', 'b', '-b', at('source.qcow2'), '-F', 'qcow2', path, 'b'))
    ok(qcow2('bitmap', '--remove', path, 'b'))
    clean(path)
  })
})

describeWithQemu('bitmap', () => {
  it('does several actions in order, and merges from another file', () => {
    const path = image('a.qcow2')
    ok(qcow2('bitmap', '--add', '--disable', '-g', '32k', path, 'b'))
    expect(ok(qemuImg('info', path))).toMatch(/name: b\n +granularity: 32768/)
    copyFileSync(path, at('other.qcow2'))
    ok(qcow2('bitmap', '--merge', 'b', '-b', at('other.qcow2'), '-F', 'qcow2', '--enable', path, 'b'))
    clean(path)
    ok(qemuImg('bitmap', '--remove', path, 'b'))
    clean(path)
  })

  it.each([
    [['--add'], 'b', /already/],
    [['--clear'], 'none', /no bitmap is named 'none'/],
    [[], 'b', /Need at least one of/],
    [['--clear', '-g', '4k'], 'b', /granularity only supported with --add/],
    [['--add', '-g', '1000'], 'c', /power of two/],
    [['--disable', '--add'], 'b', /: Operation add on bitmap b failed: a bitmap named 'b' exists already/],
    [['--merge', 'none'], 'b', /: Operation merge on bitmap b failed: no bitmap is named 'none'/],
  ] as const)('refuses %j %s', (args, name, message) => {
    const path = image('bad.qcow2')
    ok(qcow2('bitmap', '--add', path, 'b'))
    const { code, stderr } = qcow2('bitmap', ...args, path, name)
    expect(code).toBe(1)
    expect(stderr).toMatch(message)
    clean(path)
  })
})

describeWithQemu('a granularity of 0', () => {
  it('is the default', () => {
    const path = image('granularity.qcow2')
    ok(qcow2('bitmap', '--add', '-g', '0', path, 'b'))
    expect(ok(qemuImg('info', path))).toMatch(/name: b\n +granularity: 65536/)
  })
})

describeWithQemu('resize', () => {
  it('refuses part of a sector as qemu-img does, and fills up a raw disk', () => {
    const path = image('odd.qcow2')
    for (const size of ['30000001', '+511', '0.00001T']) {
      for (const tool of [qcow2, qemuImg]) {
        const { code, stderr } = tool('resize', path, size)
        expect(code).toBe(1)
        expect(stderr).toContain('The new size must be a multiple of 512')
      }
    }
    ok(qcow2('create', '-q', '-f', 'raw', at('odd.raw'), '1M'))
    ok(qcow2('resize', '-q', '-f', 'raw', at('odd.raw'), '+1'))
    expect(statSync(at('odd.raw')).size).toBe(2 ** 20 + 512)
  })

  it('grows to a size and by an amount', () => {
    const path = image('grow.qcow2')
    expect(ok(qcow2('resize', path, '20M'))).toBe('Image resized.\n')
    expect(ok(qcow2('resize', '-q', path, '+1G'))).toBe('')
    expect(ok(qemuImg('info', path))).toContain(`(${20 * 2 ** 20 + 2 ** 30} bytes)`)
    clean(path)
  })

  it('shrinks where that is asked for, as qemu-img does', () => {
    const [ours, theirs] = [image('shrink.qcow2'), at('shrink-theirs.qcow2')]
    ok(qemuIo('-c', 'write -P 7 0 8M', ours))
    copyFileSync(ours, theirs)
    const refused = [qcow2('resize', ours, '1M'), qemuImg('resize', theirs, '1M')]
    for (const { code, stderr } of refused) {
      expect(code).toBe(1)
      expect(stderr).toMatch(/warning: Shrinking an image will delete all data/)
      expect(stderr).toMatch(/Use the --shrink option to perform a shrink operation/)
    }
    expect(ok(qcow2('resize', '--shrink', ours, '--', '-6M'))).toBe('Image resized.\n')
    ok(qemuImg('resize', '--shrink', theirs, '2M'))
    ok(qemuImg('compare', '-s', ours, theirs))
    clean(ours)
    expect(statSync(ours).size).toBeLessThan(3 * 2 ** 20)
    // Both ways: what one cut, the other grows.
    ok(qcow2('resize', theirs, '4M'))
    ok(qemuImg('resize', ours, '4M'))
    ok(qemuImg('compare', '-s', ours, theirs))
    clean(theirs)
  })

  it('preallocates as qemu-img does', () => {
    for (const mode of ['metadata', 'falloc', 'full']) {
      const [ours, theirs] = [image(`${mode}.qcow2`), image(`${mode}-theirs.qcow2`)]
      ok(qcow2('resize', `--preallocation=${mode}`, ours, '+8M'))
      ok(qemuImg('resize', `--preallocation=${mode}`, theirs, '+8M'))
      clean(ours)
      ok(qemuImg('compare', '-s', ours, theirs))
      const map = (path: string) =>
        JSON.parse(ok(qemuImg('map', '--output=json', path))).map(({ offset, ...rest }: { offset?: number }) => rest)
      expect(map(ours)).toEqual(map(theirs))
    }
    const path = image('no.qcow2')
    for (const tool of [qcow2, qemuImg]) {
      expect(tool('resize', '--preallocation=falloc', path, '8M').stderr).toContain(
        'Preallocation can only be used for growing images',
      )
      expect(tool('resize', '--preallocation=some', path, '9M').stderr).toContain("Invalid preallocation mode 'some'")
    }
  })

  it.each([['1M'], ['-1M'], ['nonsense'], ['+'], ['-9M']])('refuses %s', size => {
    const path = image('keep.qcow2')
    expect(qcow2('resize', path, size).code).toBe(1)
    expect(ok(qemuImg('info', path))).toContain('(8388608 bytes)')
  })
})
