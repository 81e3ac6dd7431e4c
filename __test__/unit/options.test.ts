import { describe, expect, it } from 'vitest'
import { flag, integer, nearest, oneOf, readOptions, text } from '../../src/options.js'
import { describe as show, toBytes } from '../../src/units.js'

const table = { clusterSize: integer(512, 4096), format: oneOf('qcow2', 'raw'), name: text, strict: flag } as const

describe('readOptions', () => {
  it('returns every option of the table, undefined where it was not given', () => {
    expect(readOptions({ strict: true, name: undefined }, 'f', table)).toEqual({
      clusterSize: undefined,
      format: undefined,
      name: undefined,
      strict: true,
    })
    expect(readOptions(undefined, 'f', table).strict).toBeUndefined()
  })

  it.each([
    [{ clustersize: 512 }, "f: unknown option 'clustersize': did you mean 'clusterSize'?"],
    [{ formatt: 'raw' }, "f: unknown option 'formatt': did you mean 'format'?"],
    [{ quux: 1 }, "f: unknown option 'quux': known are clusterSize, format, name, strict"],
    [{ clusterSize: '512' }, "f: clusterSize must be a whole number of 512 to 4096, not '512'"],
    [{ clusterSize: 511 }, 'f: clusterSize must be a whole number of 512 to 4096, not 511'],
    [{ clusterSize: 512.5 }, 'f: clusterSize must be a whole number of 512 to 4096, not 512.5'],
    [{ format: 'vmdk' }, "f: format must be one of 'qcow2', 'raw', not 'vmdk'"],
    [{ name: '' }, 'f: name must not be empty'],
    [{ name: 'a\0b' }, 'f: name must not contain a null character'],
    [{ name: 7 }, 'f: name must be a string, not 7'],
    [{ strict: 1 }, 'f: strict must be true or false, not 1'],
    [null, 'f: options must be an object, not null'],
    ['raw', "f: options must be an object, not 'raw'"],
    [[], 'f: options must be an object, not an array'],
    [Buffer.alloc(1), 'f: options must be an object, not an object (Buffer)'],
  ])('refuses %j', (options, message) => {
    expect(() => readOptions(options, 'f', table)).toThrow(message)
    expect(() => readOptions(options, 'f', table)).toThrow(
      expect.objectContaining({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field: expect.any(String) }),
    )
  })

  it('names an option that has to be an object itself, and what it takes', () => {
    const nested = { shape: (value: unknown, name: string) => readOptions(value, name, { size: flag, type: flag }) }
    expect(() => readOptions({ shape: 'flat' }, 'f', nested)).toThrow(
      expect.objectContaining({ field: 'shape', message: "f: shape must be an object ({ size, type }), not 'flat'" }),
    )
  })

  it('is not fooled by names that every object has', () => {
    expect(() => readOptions(JSON.parse('{"__proto__": 1}'), 'f', table)).toThrow("unknown option '__proto__'")
    expect(() => readOptions({ toString: 1 }, 'f', table)).toThrow("unknown option 'toString'")
  })
})

describe('nearest', () => {
  it.each([
    ['signl', 'signal'],
    ['SIGNAL', 'signal'],
    ['onprogres', 'onProgress'],
    ['to', undefined],
    ['', undefined],
  ])('%j', (name, expected) => {
    expect(nearest(name, ['signal', 'onProgress'])).toBe(expected)
  })
})

describe('toBytes', () => {
  it.each([
    [0, 0],
    [1n, 1],
    [2 ** 53 - 1, 2 ** 53 - 1],
    [2n ** 53n - 1n, 2 ** 53 - 1],
    // Whole sectors are exact far beyond.
    [2n ** 53n, 2 ** 53],
    [2n ** 61n + 512n, 2 ** 61 + 512],
  ])('%s', (value, expected) => {
    expect(toBytes(value, 'x')).toBe(expected)
  })

  it.each([
    -1,
    -1n,
    0.5,
    Number.NaN,
    Number.POSITIVE_INFINITY,
    2 ** 53,
    2n ** 53n + 1n,
    2n ** 63n,
    2n ** 62n + 512n,
    '1',
    null,
    undefined,
    {},
  ])('refuses %s', value => {
    expect(() => toBytes(value, 'x')).toThrow(
      expect.objectContaining({ code: 'ERR_QCOW2_INVALID_ARGUMENT', message: expect.stringContaining(show(value)) }),
    )
  })
})
