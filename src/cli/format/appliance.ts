/** The document of what an appliance has. */

import type { ListedDisk, Listing } from '../../backing/listing.js'
import type { Json } from './json.js'

/** Names as the descriptor's own, with dashes. A disk is populated where it has a file. */
export const applianceDocument = ({
  kind,
  disks,
  manifest,
}: Listing): { readonly [key: string]: Json | undefined } => ({
  kind,
  'has-manifest': manifest !== undefined,
  manifest,
  disks: disks.map(diskDocument),
})

const diskDocument = ({ listed, file, found }: ListedDisk): { readonly [key: string]: Json | undefined } => ({
  'disk-id': listed?.diskId,
  file,
  present: file === undefined ? undefined : found !== undefined,
  'file-size': found?.length ?? listed?.fileSize,
  compression: listed?.compression,
  capacity: listed?.capacity,
  format: listed?.format,
  'image-format': found?.format,
  populated: file !== undefined,
  'populated-size': listed?.populatedSize,
  parent: listed?.parent,
})
