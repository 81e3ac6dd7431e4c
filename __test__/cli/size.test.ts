import { describe, expect, it } from 'vitest'
import { parseSize, sizeArgument, toSize } from '../../src/cli/size.js'

describe('sizes', () => {
  it.each([
    ['0', 0n],
    ['1024', 1024n],
    ['1024b', 1024n],
    ['1k', 1024n],
    ['1K', 1024n],
    ['1M', 1n << 20n],
    ['1.5G', 1610612736n],
    ['1.5t', 1649267441664n],
    ['2P', 2n << 50n],
    ['7E', 7n << 60n],
    ['1.5E', 3n << 59n],
    ['.5k', 512n],
    ['1.', 1n],
    ['1.k', 1024n],
    ['1024.0', 1024n],
    ['1024.0b', 1024n],
    ['1.1M', 1153434n],
    ['0.0009765625k', 1n],
    ['0.0004k', 0n],
    ['0.0005k', 1n],
    ['0.00001T', 10995116n],
    ['.000001k', 0n],
    ['+5k', 5120n],
    [' 5k', 5120n],
    ['0x10', 16n],
    ['0XfF', 255n],
    ['18446744073709551615', 2n ** 64n - 1n],
  ])('%s is %s bytes', (text, value) => {
    expect(parseSize(text)).toEqual({ value })
  })

  it.each([
    '',
    ' ',
    'k',
    '.',
    '.k',
    '1.5',
    '1.5b',
    '1kilobyte',
    'foobar',
    '1 k',
    '-1k',
    '0x',
    '0x10k',
    '1e3',
    '1Z',
    '5k ',
  ])('"%s" is not a size', text => {
    expect(parseSize(text)).toEqual({ failure: 'syntax' })
  })

  it.each(['-1024', '18446744073709551616', '16E', '0x10000000000000000'])('%s is out of range', text => {
    expect(parseSize(text)).toEqual({ failure: 'range' })
  })

  it('says what is wrong with an argument', () => {
    expect(() => sizeArgument('image size', 'x')).toThrow(
      expect.objectContaining({
        message: "Invalid image size specified: 'x'.",
        hint: expect.stringContaining('Optional suffix k, M, G, T, P or E'),
      }),
    )
    expect(() => sizeArgument('image size', '8E')).toThrow(
      'Invalid image size specified. Must be between 0 and 9223372036854775807.',
    )
    expect(() => sizeArgument('level', '3', { min: 5n, max: 9n })).toThrow('Must be between 5 and 9.')
    expect(sizeArgument('image size', '7E')).toBe(7n << 60n)
  })

  it('keeps what a number cannot hold', () => {
    expect(toSize(2n ** 53n - 1n)).toBe(2 ** 53 - 1)
    expect(toSize(2n ** 53n + 1n)).toBe(2n ** 53n + 1n)
  })
})
