/** NBD servers by the URIs of their exports. */

import { encodeText } from '../text.js'

/** Each byte that could mean something in a URI by its number. */
const percent = (text: string): string =>
  Array.from(encodeText(text), byte => {
    const character = String.fromCharCode(byte)
    return /[\w.~/-]/.test(character) ? character : `%${byte.toString(16).padStart(2, '0')}`
  }).join('')

/** Where a server is. */
export type NbdServerPlace = { readonly path: string } | { readonly host: string; readonly port?: string }

/** The URI of an export. */
export function uriOf(server: NbdServerPlace, name: string): string {
  if ('path' in server) return `nbd+unix:///${percent(name)}?socket=${percent(server.path)}`
  const { host, port } = server
  return `nbd://${host.includes(':') ? `[${host}]` : percent(host)}${port === undefined ? '' : `:${port}`}/${percent(name)}`
}

/** The server of an export's URI, as qemu-img names it: the path of a socket, or a host and its port. */
export function serverOf(uri: string): string {
  const socket = /^nbd\+unix:\/\/\/[^?]*\?socket=(.*)$/.exec(uri)?.[1]
  const text = socket ?? /^nbd:\/\/([^/]*)/.exec(uri)?.[1] ?? uri
  try {
    return decodeURIComponent(text)
  } catch {
    // Bytes that are no text stay as they are.
    return text
  }
}
