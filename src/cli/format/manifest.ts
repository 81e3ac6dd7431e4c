/** What a check against a manifest found. */

import type { VerifiedFile, VerifyResult } from '../../index.js'
import { toJson } from './json.js'

const badOf = ({ files }: VerifyResult): readonly VerifiedFile[] => files.filter(({ state }) => state !== 'ok')

/** One line for each file that is not as the manifest says, and for each that it does not list. */
export function manifestFindings(found: VerifyResult): string[] {
  const bad = badOf(found).map(({ name, algorithm, expected, actual }) =>
    actual === undefined
      ? `ERROR ${name} is missing: '${found.manifest}' lists it`
      : `ERROR ${name}: ${algorithm} is ${actual}, '${found.manifest}' has ${expected}`,
  )
  return [...bad, ...found.unlisted.map(name => `Warning: '${found.manifest}' does not list ${name}`)]
}

export function formatManifest(found: VerifyResult): string {
  const count = badOf(found).length
  if (count > 0) return `\n${count} of ${found.files.length} files are not as the manifest says.\n`
  return `No errors were found: ${found.files.length} files are as the manifest says.\n`
}

export const manifestJson = (filename: string, found: VerifyResult): string =>
  `${toJson({
    filename,
    manifest: found.manifest,
    'check-errors': 0,
    ...(found.ok ? {} : { corruptions: badOf(found).length }),
    files: found.files.map(({ name, algorithm, expected, actual, state }) => ({
      name,
      algorithm,
      expected,
      actual,
      state,
    })),
    unlisted: found.unlisted,
  })}\n`
