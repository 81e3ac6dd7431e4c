/** Certificates and keys as `qemu-nbd` takes them, made for one run of a test by the `openssl` command. */

import { execFileSync, spawnSync } from 'node:child_process'
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

/** Whether certificates can be made here. Tests that need some say that they were skipped. */
export const haveOpenssl = spawnSync('openssl', ['version']).status === 0
if (!haveOpenssl) console.warn('SKIPPED tests with certificates: openssl is not installed')

const NAMES = 'DNS:localhost,IP:127.0.0.1'

/** The keys of two users, as `keys.psk` has them. */
export const KEYS = {
  qemu: '00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff',
  bob: 'b0b0b0b0b0b0b0b0',
}

/** Folders with what a server and a client have: certificates of one authority, those of a stranger, and shared keys. */
export interface Credentials {
  readonly server: string
  readonly client: string
  readonly stranger: string
  readonly psk: string
}

/** Makes them below a folder. */
export function makeCredentials(folder: string): Credentials {
  const made = (name: string): string => {
    mkdirSync(join(folder, name))
    return join(folder, name)
  }
  const openssl = (...args: readonly string[]): void => {
    execFileSync('openssl', args, { cwd: folder, stdio: ['ignore', 'ignore', 'ignore'] })
  }
  const key = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes']
  const authority = (name: string): void => {
    const may = ['-addext', 'basicConstraints=critical,CA:TRUE', '-addext', 'keyUsage=critical,keyCertSign,cRLSign']
    const out = ['-keyout', `${name}.key`, '-out', `${name}.pem`, '-days', '2', '-subj', `/CN=${name}`]
    openssl('req', '-x509', ...key, ...out, ...may)
  }
  const certificate = (who: 'server' | 'client', by: string, into: string): void => {
    const usage = 'keyUsage=critical,digitalSignature,keyEncipherment'
    const rules = `basicConstraints=critical,CA:FALSE\n${usage}\nextendedKeyUsage=${who}Auth\nsubjectAltName=${NAMES}\n`
    writeFileSync(join(folder, 'rules'), rules)
    openssl('req', ...key, '-keyout', join(into, `${who}-key.pem`), '-out', 'request', '-subj', `/CN=${who}`)
    const signed = ['-CA', `${by}.pem`, '-CAkey', `${by}.key`, '-CAcreateserial', '-days', '2', '-extfile', 'rules']
    openssl('x509', '-req', '-in', 'request', ...signed, '-out', join(into, `${who}-cert.pem`))
    openssl('x509', '-in', `${by}.pem`, '-out', join(into, 'ca-cert.pem'))
  }
  authority('authority')
  authority('another')
  const [server, client, stranger, psk] = [made('server'), made('client'), made('stranger'), made('psk')]
  certificate('server', 'authority', server)
  certificate('client', 'authority', client)
  certificate('client', 'another', stranger)
  const lines = Object.entries(KEYS).map(([user, hex]) => `${user}:${hex}\n`)
  writeFileSync(join(psk, 'keys.psk'), lines.join(''), { mode: 0o600 })
  return { server, client, stranger, psk }
}
