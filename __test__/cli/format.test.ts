import { describe, expect, it } from 'vitest'
import { type CheckCounters, checkExitCode, checkJson, formatCheck } from '../../src/cli/format/check.js'
import { formatInfo, type InfoDocument } from '../../src/cli/format/info.js'
import { toJson } from '../../src/cli/format/json.js'
import { humanMap, jsonMap, type MapExtent, type MapWriter } from '../../src/cli/format/map.js'
import { formatMeasure, measureJson } from '../../src/cli/format/measure.js'
import { fixed, humanSize, threeDigits } from '../../src/cli/format/number.js'

describe('numbers', () => {
  it.each([
    [0, '0'],
    [1, '1'],
    [1.5, '1.5'],
    [1.390625, '1.39'],
    [0.9755859375, '0.976'],
    [99.96, '100'],
    [204, '204'],
    [999.5, '1e+03'],
    [0.00001234, '1.23e-05'],
  ])('%d has three digits: %s', (value, text) => {
    expect(threeDigits(value)).toBe(text)
  })

  it('rounds an exact half to the even digit, as printf does', () => {
    expect([0.125, 0.375, 0.135, 12.5, 100].map(value => fixed(value, 2))).toEqual([
      '0.12',
      '0.38',
      '0.14',
      '12.50',
      '100.00',
    ])
    expect([320.5, 321.5, 320.50001, 0.5].map(value => fixed(value, 0))).toEqual(['320', '322', '321', '0'])
  })

  it.each([
    [0, '0 B'],
    [512, '512 B'],
    [999, '999 B'],
    [1023999, '1e+03 KiB'],
    [1000, '0.977 KiB'],
    [1024, '1 KiB'],
    [196608 + 512, '192 KiB'],
    [328192, '320 KiB'],
    [1573376, '1.5 MiB'],
    [67108864, '64 MiB'],
    [1023 * 1024 * 1024, '0.999 GiB'],
    [2 ** 53, '8 PiB'],
  ])('%d bytes are %s', (bytes, text) => {
    expect(humanSize(bytes)).toBe(text)
  })
})

describe('JSON', () => {
  it('opens empty collections, orders fields as QEMU does, leaves out what is not set', () => {
    expect(toJson({ format: 'raw', children: [], 'dirty-flag': false, 'actual-size': undefined, data: {} })).toBe(
      '{\n    "children": [\n    ],\n    "format": "raw",\n    "dirty-flag": false,\n    "data": {\n    }\n}',
    )
  })

  it('escapes all but ASCII', () => {
    expect(toJson('é"\\\t\u0001\u001f\u007f😀/')).toBe('"\\u00E9\\"\\\\\\t\\u0001\\u001F\\u007F\\uD83D\\uDE00/"')
  })
})

const file = (filename: string, length: number, actual: number): InfoDocument => ({
  children: [],
  filename,
  format: 'file',
  'virtual-size': length,
  'actual-size': actual,
  'format-specific': { type: 'file', data: {} },
  'dirty-flag': false,
})

const OVERLAY: InfoDocument = {
  filename: 'o/b.qcow2',
  format: 'qcow2',
  'virtual-size': 67108864,
  'actual-size': 208896,
  'cluster-size': 65536,
  encrypted: true,
  'dirty-flag': true,
  'backing-filename': 'a.qcow2',
  'full-backing-filename': 'o/a.qcow2',
  'backing-filename-format': 'qcow2',
  snapshots: [
    {
      id: '1',
      name: 'before-upgrade-to-13',
      'vm-state-size': 3 * 1024 * 1024,
      'date-sec': Date.UTC(2026, 10, 3, 4, 5, 6) / 1000 + new Date(Date.UTC(2026, 10, 3)).getTimezoneOffset() * 60,
      'date-nsec': 0,
      'vm-clock-sec': 36061,
      'vm-clock-nsec': 42000000,
      icount: 7,
    },
    {
      id: '2',
      name: 's',
      'vm-state-size': 0,
      'date-sec': 0,
      'date-nsec': 0,
      'vm-clock-sec': 0,
      'vm-clock-nsec': 0,
    },
  ],
  'format-specific': {
    type: 'qcow2',
    data: {
      compat: '1.1',
      'compression-type': 'zstd',
      'lazy-refcounts': true,
      bitmaps: [{ flags: ['auto', 'in-use'], name: 'bm0', granularity: 65536 }],
      'refcount-bits': 16,
      corrupt: false,
      'extended-l2': true,
    },
  },
  children: [{ name: 'file', info: file('o/b.qcow2', 328192, 208896) }],
}

describe('info', () => {
  it('prints everything that an image can have', () => {
    expect(formatInfo([OVERLAY])).toMatch(
      /^image: o\/b.qcow2\nfile format: qcow2\nvirtual size: 64 MiB \(67108864 bytes\)\ndisk size: 204 KiB\nencrypted: yes\ncluster_size: 65536\ncleanly shut down: no\nbacking file: a.qcow2 \(actual path: o\/a.qcow2\)\nbacking file format: qcow2\nSnapshot list:\nID {6}TAG {15}VM_SIZE {16}DATE {8}VM_CLOCK {5}ICOUNT\n1 {7}before-upgrade-to-13 {4}3 MiB 2026-11-03 04:05:06 {2}0010:01:01.042 {10}7\n2 {7}s {21}0 B \d{4}-\d\d-\d\d \d\d:\d\d:\d\d {2}0000:00:00.000 {9}--\nFormat specific information:\n {4}compat: 1.1\n {4}compression type: zstd\n {4}lazy refcounts: true\n {4}bitmaps:\n {8}\[0\]:\n {12}flags:\n {16}\[0\]: auto\n {16}\[1\]: in-use\n {12}name: bm0\n {12}granularity: 65536\n {4}refcount bits: 16\n {4}corrupt: false\n {4}extended l2: true\nChild node '\/file':\n {4}filename: o\/b.qcow2\n {4}protocol type: file\n {4}file length: 320 KiB \(328192 bytes\)\n {4}disk size: 204 KiB\n$/,
    )
  })

  it('separates the images of a chain', () => {
    const raw: InfoDocument = { ...file('r.raw', 512, 0), format: 'raw', children: [] }
    expect(formatInfo([raw, raw]).split('\n\n')).toHaveLength(2)
    expect(formatInfo([{ ...raw, 'backing-filename': 'json:{}' }])).toContain(
      'backing file: json:{} (cannot determine actual path)\n',
    )
    const { 'actual-size': _, ...unknown } = raw
    expect(formatInfo([unknown])).toContain('disk size: unavailable\n')
  })
})

const CLEAN: CheckCounters = {
  filename: 'a.qcow2',
  format: 'qcow2',
  checkErrors: 0,
  corruptions: 0,
  leaks: 0,
  corruptionsFixed: 0,
  leaksFixed: 0,
  imageEndOffset: 1638400,
  totalClusters: 1024,
  allocatedClusters: 18,
  fragmentedClusters: 0,
  compressedClusters: 0,
}

describe('check', () => {
  it('prints a clean image', () => {
    expect(formatCheck(CLEAN)).toBe(
      'No errors were found on the image.\n' +
        '18/1024 = 1.76% allocated, 0.00% fragmented, 0.00% compressed clusters\n' +
        'Image end offset: 1638400\n',
    )
    expect(checkJson(CLEAN)).toBe(`{
    "image-end-offset": 1638400,
    "total-clusters": 1024,
    "check-errors": 0,
    "allocated-clusters": 18,
    "filename": "a.qcow2",
    "format": "qcow2"
}
`)
  })

  it('prints what it found', () => {
    const found = { ...CLEAN, corruptions: 2, leaks: 3, checkErrors: 1, allocatedClusters: 0, imageEndOffset: 0 }
    expect(formatCheck(found)).toBe(`
2 errors were found on the image.
Data may be corrupted, or further writes to the image may corrupt it.

3 leaked clusters were found on the image.
This means waste of disk space, but no harm to data.

1 internal errors have occurred during the check.
`)
    expect(JSON.parse(checkJson(found))).toEqual({
      'total-clusters': 1024,
      'check-errors': 1,
      corruptions: 2,
      leaks: 3,
      filename: 'a.qcow2',
      format: 'qcow2',
    })
  })

  it('has an exit code for each outcome', () => {
    expect(checkExitCode(CLEAN)).toBe(0)
    expect(checkExitCode({ ...CLEAN, leaks: 1 })).toBe(3)
    expect(checkExitCode({ ...CLEAN, leaks: 1, corruptions: 1 })).toBe(2)
    expect(checkExitCode({ ...CLEAN, corruptions: 1, checkErrors: 1 })).toBe(1)
  })
})

describe('measure', () => {
  it('prints both forms', () => {
    expect(formatMeasure({ required: 1, fullyAllocated: 2 })).toBe('required size: 1\nfully allocated size: 2\n')
    expect(formatMeasure({ required: 1, fullyAllocated: 2, bitmaps: 0 })).toContain('bitmaps size: 0\n')
    expect(measureJson({ required: 1, fullyAllocated: 2, bitmaps: 3 })).toBe(
      '{\n    "bitmaps": 3,\n    "required": 1,\n    "fully-allocated": 2\n}\n',
    )
  })
})

describe('map', () => {
  const hole = { depth: 0, present: false, zero: true, data: false, compressed: false }
  const data = { depth: 1, present: true, zero: false, data: true, compressed: false }
  const extents: MapExtent[] = [
    { start: 0, length: 1048576, ...data, offset: 327680, filename: 'a.qcow2' },
    { start: 1048576, length: 9437184, ...hole },
    { start: 10485760, length: 102400, ...data, offset: 0, filename: 'a.qcow2' },
  ]
  const all = (writer: MapWriter, list: readonly MapExtent[]) =>
    writer.begin + list.map(extent => writer.extent(extent)).join('') + writer.end

  it('lists data for people', () => {
    expect(all(humanMap(), extents)).toBe(`Offset          Length          Mapped to       File
0               0x100000        0x50000         a.qcow2
0xa00000        0x19000         0               a.qcow2
`)
  })

  it('cannot show people where compressed data lies', () => {
    expect(() => humanMap().extent({ start: 0, length: 1, ...data, compressed: true })).toThrow(
      'File contains external, encrypted or compressed clusters.',
    )
  })

  it('lists everything as JSON', () => {
    expect(all(jsonMap(0), extents)).toBe(
      '[{ "start": 0, "length": 1048576, "depth": 1, "present": true, "zero": false, "data": true, "compressed": false, "offset": 327680},\n' +
        '{ "start": 1048576, "length": 9437184, "depth": 0, "present": false, "zero": true, "data": false, "compressed": false},\n' +
        '{ "start": 10485760, "length": 102400, "depth": 1, "present": true, "zero": false, "data": true, "compressed": false, "offset": 0}]\n',
    )
    expect(all(jsonMap(5), [])).toBe(
      '[{ "start": 5, "length": 0, "depth": 0, "present": false, "zero": false, "data": false, "compressed": false}]\n',
    )
  })
})
