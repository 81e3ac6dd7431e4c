import { describe, expect, it } from 'vitest'
import { readDataFileName, readFileName } from '../../src/backing/filename.js'
import { detectFormat } from '../../src/formats/probe.js'

describe('the name of a backing file', () => {
  it.each([
    ['base.qcow2', '/images/top.qcow2', '/images/base.qcow2'],
    ['../base.qcow2', '/images/top.qcow2', '/images/../base.qcow2'],
    ['base.qcow2', 'top.qcow2', 'base.qcow2'],
    ['base.qcow2', 'images/top.qcow2', 'images/base.qcow2'],
    ['/base.qcow2', '/images/top.qcow2', '/base.qcow2'],
    ['./a:b.qcow2', '/images/top.qcow2', '/images/./a:b.qcow2'],
    ['file:/base.qcow2', '/images/top.qcow2', '/base.qcow2'],
    ['file:base:1', '/images/top.qcow2', 'base:1'],
  ])('%s in %s', (name, from, path) => {
    expect(readFileName(name, from)).toEqual({ path })
  })

  it.each([
    ['json:{"driver":"raw"}', /JSON description/],
    ['nbd:localhost:10809', /'nbd:' is a protocol/],
    ['http://example.org/a.img', /'http:' is a protocol/],
    [':', /':' is a protocol/],
    ['', /empty/],
  ])('refuses %j', (name, reason) => {
    expect(readFileName(name, '/images/top.qcow2')).toEqual({ refused: expect.stringMatching(reason) })
    expect(readDataFileName(name)).toEqual({ refused: expect.stringMatching(reason) })
  })

  it('cannot be relative to nothing', () => {
    expect(readFileName('base.qcow2', undefined)).toHaveProperty('refused')
    expect(readFileName('/base.qcow2', undefined)).toEqual({ path: '/base.qcow2' })
  })
})

it('a data file is relative to the process', () => {
  expect(readDataFileName('disk.data')).toEqual({ path: 'disk.data' })
})

describe('formats by their first bytes', () => {
  const bytes = (...parts: (string | readonly number[])[]): Buffer =>
    Buffer.concat(parts.map(part => (typeof part === 'string' ? Buffer.from(part, 'latin1') : Buffer.from(part))))

  it.each([
    ['qcow2', bytes('QFI\xfb', [0, 0, 0, 2])],
    ['qcow2', bytes('QFI\xfb', [0, 0, 0, 3])],
    ['qcow2', bytes('QFI\xfb', [0, 0, 0, 9])],
    ['qcow2', bytes('QFI\xfb')],
    ['qcow', bytes('QFI\xfb', [0, 0, 0, 1])],
    ['vmdk', bytes('KDMV')],
    ['vmdk', bytes('COWD')],
    ['vmdk', bytes('# Disk DescriptorFile\nversion=1\n')],
    ['vmdk', bytes('# a comment\n\n  \nversion=3\n')],
    ['vhdx', bytes('vhdxfile')],
    ['vpc', bytes('conectix')],
    ['vdi', bytes(new Array<number>(0x40).fill(0), [0x7f, 0x10, 0xda, 0xbe])],
    ['qed', bytes('QED\0')],
    ['luks', bytes('LUKS\xba\xbe', [0, 1])],
    ['parallels', bytes('WithoutFreeSpace')],
    ['parallels', bytes('WithouFreSpacExt')],
    ['parallels', bytes('\xef\xbb\xbf<?xml version="1.0"?>\n<Parallels_disk_image Version="1.0">')],
    [undefined, bytes('# <Parallels_disk_image>')],
    [undefined, bytes('<?xml version="1.0"?><Parallels_disk_images>')],
    ['bochs', bytes('Bochs Virtual HD Image')],
    ['cloop', bytes('#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount')],
    ['dmg', bytes('koly')],
    [undefined, bytes()],
    [undefined, bytes('QFI')],
    [undefined, bytes('#!/bin/sh\necho version=1\n')],
    [undefined, bytes('\nversion=4\n')],
    [undefined, bytes(new Array<number>(1024).fill(0))],
  ])('%s', (format, head) => {
    expect(detectFormat(head)).toBe(format)
  })
})
