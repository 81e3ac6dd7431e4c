/**
 * Names and paths, which are bytes: mostly UTF-8, but nothing makes them so.
 *
 * Inside the library each is a string that has every byte: one that is not part of UTF-8 is a lone surrogate, U+DC80 to U+DCFF, which
 * no text has. Such a string is joined, cut and compared like any other, different bytes are different strings, and
 * {@link encodeText} gives the bytes back. What users see is text, with replacement characters, and the bytes beside it
 * ({@link shown}); what users say is text or bytes.
 */

import { isUtf8 } from 'node:buffer'

/** A name of a snapshot, bitmap or file as an image stores it: text, which is stored as UTF-8, or the bytes themselves. */
export type Name = string | Uint8Array

/** Bytes that are not UTF-8. With the flag `u`, surrogates that make a pair are no match. */
const ESCAPED = /[\uDC80-\uDCFF]/u
const LONE_SURROGATE = /\p{Surrogate}/u
const REPLACEMENT = '\uFFFD'
const ESCAPE = 0xdc00

/** Whether this is all text. */
export const isText = (text: string): boolean => !ESCAPED.test(text)

/** The text of bytes, exactly: see above. */
export function decodeText(bytes: Uint8Array): string {
  const buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  if (isUtf8(buffer)) return buffer.toString()
  let text = ''
  for (let at = 0; at < buffer.length; ) {
    const first = buffer[at] ?? 0
    const character = buffer.subarray(at, at + lengthOf(first))
    if (isUtf8(character)) {
      text += character.toString()
      at += character.length
    } else {
      text += String.fromCharCode(ESCAPE | first)
      at += 1
    }
  }
  return text
}

/** How long a character of UTF-8 is that begins with this byte. */
const lengthOf = (first: number): number => (first < 0xc0 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4)

/** The bytes of a text. */
export function encodeText(text: string): Buffer {
  if (isText(text)) return Buffer.from(text)
  const parts = text.match(/[\uDC80-\uDCFF]|[^\uDC80-\uDCFF]+/gu) ?? []
  return Buffer.concat(
    parts.map(part => (isText(part) ? Buffer.from(part) : Buffer.from([(part.codePointAt(0) ?? 0) & 0xff]))),
  )
}

/** What a person reads: replacement characters for what is no text. */
export const shownText = (text: string): string => (isText(text) ? text : encodeText(text).toString())

/** A string of the user's, who has no bytes in it. */
export const userText = (text: string): string =>
  LONE_SURROGATE.test(text) ? text.replace(/\p{Surrogate}/gu, REPLACEMENT) : text

/** A field for users: its text, and the bytes where the text does not have them. */
export type Shown<K extends string> = { readonly [P in K]: string } & { readonly [P in `${K}Bytes`]?: Buffer }

/** The field `key` of something that users get: see {@link Shown}. */
export function shown<const K extends string>(key: K, text: string): Shown<K> {
  if (isText(text)) return { [key]: text } as Shown<K>
  const bytes = encodeText(text)
  return { [key]: bytes.toString(), [`${key}Bytes`]: bytes } as Shown<K>
}

/** Back from {@link shown}. */
export const exactText = (text: string, bytes: Uint8Array | undefined): string =>
  bytes === undefined ? text : decodeText(bytes)

/** The text as a call takes it that must not guess: bytes where text alone could stand for something else. */
export const toName = (text: string): string | Buffer =>
  isText(text) && !text.includes(REPLACEMENT) ? text : encodeText(text)

/** Whether a string can stand for names whose bytes it does not have. */
export const canBeInexact = (name: Name): name is string => typeof name === 'string' && name.includes(REPLACEMENT)

/** The name that the user said, which is not looked up. */
export const exactName = (name: Name): string => (typeof name === 'string' ? userText(name) : decodeText(name))

/**
 * Which of some names the user means, -1 for none. Bytes mean exactly one; text means what is shown as it, and must not be shown for
 * two: `ambiguous` makes the error.
 */
export function findName(names: readonly string[], wanted: Name, ambiguous: () => Error): number {
  if (!canBeInexact(wanted)) return names.indexOf(exactName(wanted))
  const found = names.findIndex(name => shownText(name) === wanted)
  if (names.some(name => shownText(name) === wanted && name !== names[found])) throw ambiguous()
  return found
}
