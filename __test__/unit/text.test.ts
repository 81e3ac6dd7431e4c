import { describe, expect, it } from 'vitest'
import {
  decodeText,
  encodeText,
  exactName,
  findName,
  isText,
  shown,
  shownText,
  toName,
  userText,
} from '../../src/text.js'

const PIECES = [
  [0xe9],
  [0x61],
  [0xc3, 0xa9],
  [0xed, 0xa0, 0x80],
  [0xf0, 0x9f, 0x92, 0xbe],
  [0xc0, 0x80],
  [0xff],
  [0x80],
  [0xef, 0xbf, 0xbd],
  [0xe2, 0x82],
]

/** Every name of three pieces. */
const names = PIECES.flatMap(a => PIECES.flatMap(b => PIECES.map(c => Buffer.from([...a, ...b, ...c]))))

describe('text that has every byte', () => {
  it('gives back the bytes, and different bytes are different texts', () => {
    for (const bytes of names) expect(encodeText(decodeText(bytes))).toEqual(bytes)
    expect(new Set(names.map(decodeText)).size).toBe(new Set(names.map(bytes => bytes.toString('hex'))).size)
  })

  it('is plain text where the bytes are UTF-8', () => {
    for (const bytes of names) expect(isText(decodeText(bytes))).toBe(Buffer.from(bytes.toString()).equals(bytes))
    expect(decodeText(Buffer.from('caf\u00e9 \u{1f4be}'))).toBe('caf\u00e9 \u{1f4be}')
  })

  it('is shown as Node shows the bytes, with the bytes beside it', () => {
    for (const bytes of names) expect(shownText(decodeText(bytes))).toBe(bytes.toString())
    expect(shown('name', decodeText(Buffer.from('caf\xe9', 'latin1')))).toEqual({
      name: 'caf\uFFFD',
      nameBytes: Buffer.from('caf\xe9', 'latin1'),
    })
    expect(shown('name', 'caf\u00e9')).toEqual({ name: 'caf\u00e9' })
  })

  it('has no bytes of a user who gave a string', () => {
    expect(userText('a\uDCE9\uD83D\uDCBE')).toBe('a\uFFFD\u{1f4be}')
    expect(toName('plain')).toBe('plain')
    expect(toName('a\uFFFD')).toEqual(Buffer.from('a\uFFFD'))
  })
})

describe('finding a name', () => {
  const [one, two, literal] = ['caf\uDCE9', 'caf\uDCE8', 'caf\uFFFD']
  const ambiguous = (): Error => new Error('ambiguous')
  const find = (all: string[], wanted: string | Uint8Array): number => findName(all, wanted, ambiguous)

  it('by bytes means exactly one', () => {
    expect(find([one, two, literal], encodeText(two))).toBe(1)
    expect(find([one, two, literal], Buffer.from(literal))).toBe(2)
    expect(find([one, literal], encodeText(two))).toBe(-1)
  })

  it('by text means what is shown as it, unless that is several', () => {
    expect(find(['a', one], 'caf\uFFFD')).toBe(1)
    expect(find([two, two], 'caf\uFFFD')).toBe(0)
    expect(find([one, two], 'cafe')).toBe(-1)
    for (const pair of [
      [one, two],
      [one, literal],
      [literal, one],
    ])
      expect(() => find(pair, 'caf\uFFFD')).toThrow('ambiguous')
  })

  it('never takes a string for bytes', () => {
    expect(find([one], one)).toBe(-1)
    expect(exactName(one)).toBe('caf\uFFFD')
  })
})
